"""Does everybody do through the admin API what their role allows, and no more? Over real TLS, from outside loopback's
view: the API is bound to all addresses."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

from certificates import TestCA
from controlplane.access import (
    POLICY,
    TOKENS,
    VIRTUAL_SERVICE,
    YAML,
    client_of,
    running,
    settings_of,
    workload,
    write_access,
)
from meshlib.controlplane.access_rules import AccessFile, read_rules
from meshlib.controlplane.gate import CHECKED, COOKIE, CSRF, NARROWED, PUSHED
from meshlib.controlplane.private_files import StateError
from meshlib.controlplane.server import ControlPlane
from meshlib.identity.credentials import Credentials
from meshlib.identity.proof import prove
from meshlib.model import SpiffeId
from pushes import REVIEWS, metrics, spans

CI = SpiffeId.of("cluster.local", "ops", "ci")
READS = (
    "/version", "/v1/objects", "/v1/problems", "/v1/clients", "/v1/endpoints", "/v1/graph", "/v1/series?node=x",
    "/v1/traces", "/v1/changes", "/v1/audit", "/v1/tokens", "/v1/ca", "/v1/whoami",
)  # fmt: skip


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    more = "- {role: operator, to: ['spiffe://cluster.local/ns/ops/sa/ci'], namespaces: [default]}\n"
    async with running(settings_of(tmp_path, more)) as made:
        yield made


async def apply(client: httpx.AsyncClient, text: str, namespace: str) -> httpx.Response:
    return await client.post("/v1/apply", content=text.replace("NAMESPACE", namespace), headers=YAML)


async def test_without_a_token_nothing_is_told(plane: ControlPlane) -> None:
    """But that the process lives, and the page's own files, which are the same for everybody."""
    assert plane.admin_url.startswith("https://")
    async with client_of(plane) as client:
        for path in READS:
            answer = await client.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Bearer")
        for path in ("/v1/apply", "/v1/delete", "/v1/tokens", "/v1/tokens/revoke", "/v1/ca/rotate", "/v1/nothing"):
            assert (await client.post(path, headers=YAML)).status_code == 401, path
        for path in ("/healthz", "/readyz", "/dashboard/", "/dashboard/app.js"):
            assert (await client.get(path)).status_code == 200, path
        for token in ("mat_guess", "x.y.z", "nonsense"):
            answer = await client.get("/v1/objects", headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == 401
        two = [("authorization", f"Bearer {TOKENS['alice']}"), ("authorization", "Bearer x")]
        assert (await client.get("/v1/objects", headers=two)).status_code == 401


@pytest.mark.parametrize(
    ("who", "steer_default", "guard_default", "steer_dev", "guard_dev"),
    [
        ("alice", 200, 200, 200, 200),
        ("olaf", 200, 403, 403, 403),
        ("vera", 403, 403, 403, 403),
        ("dora", 403, 403, 200, 200),
        ("nemo", 403, 403, 403, 403),
    ],
)
async def test_roles_by_namespace(
    plane: ControlPlane, who: str, steer_default: int, guard_default: int, steer_dev: int, guard_dev: int
) -> None:
    """A role counts in its namespaces; security is an admin's; of several objects all are taken, or none."""
    async with client_of(plane, who) as client:
        for text, namespace, status in (
            (VIRTUAL_SERVICE, "default", steer_default),
            (POLICY, "default", guard_default),
            (VIRTUAL_SERVICE, "dev", steer_dev),
            (POLICY, "dev", guard_dev),
        ):
            assert (await apply(client, text, namespace)).status_code == status, (text, namespace)
        mixed = VIRTUAL_SERVICE.replace("NAMESPACE", "default").replace("2s", "3s") + "---" + POLICY
        answer = await apply(client, mixed, "prod")
        assert answer.status_code == (200 if who == "alice" else 403)
        if who != "alice":
            assert "nothing was changed" in answer.text or "no role" in answer.text
            query = {"kind": "AuthorizationPolicy", "name": "deny-all", "namespace": "prod"}
            assert (await client.post("/v1/delete", params=query, headers=YAML)).status_code == 403
            assert (await client.post("/v1/ca/rotate?step=begin", headers=YAML)).status_code == 403
            token = {"namespace": "prod", "service_account": "bank", "ttl": "60"}
            assert (await client.post("/v1/tokens", params=token, headers=YAML)).status_code == 403
    assert plane._store is not None
    assert not any("3s" in str(each.raw) for each in plane._store.objects() if who != "alice")


async def test_what_is_read_is_of_the_readers_namespaces(plane: ControlPlane) -> None:
    """Objects, changes, the audit log and join tokens of others are not there."""
    async with client_of(plane, "alice") as alice, client_of(plane, "vera") as vera, client_of(plane, "dora") as dora:
        for namespace in ("default", "dev"):
            assert (await apply(alice, VIRTUAL_SERVICE, namespace)).status_code == 200
            query = {"namespace": namespace, "service_account": "reviews", "ttl": "60"}
            assert (await alice.post("/v1/tokens", params=query, headers=YAML)).status_code == 200

        async def seen(client: httpx.AsyncClient, path: str, field: str) -> list[str]:
            answer = await client.get(path)
            assert answer.status_code == 200, answer.text
            return sorted({each["namespace"] for each in answer.json()[field]})

        assert await seen(vera, "/v1/objects", "objects") == ["default"]
        assert await seen(vera, "/v1/changes", "changes") == ["default"]
        assert await seen(dora, "/v1/objects", "objects") == ["dev"]
        assert await seen(dora, "/v1/audit", "entries") == ["dev"]
        assert await seen(alice, "/v1/objects", "objects") == ["default", "dev"]
        assert (await vera.get("/v1/audit")).status_code == 403
        assert (await vera.get("/v1/tokens")).json() == {"tokens": []}
        (token,) = (await dora.get("/v1/tokens")).json()["tokens"]
        assert "/ns/dev/" in token["identity"]
        revoked = await vera.post("/v1/tokens/revoke", params={"id": token["id"]}, headers=YAML)
        assert revoked.status_code == 404
        for path in READS:
            assert (await vera.get(path)).status_code in (200, 403), path
        async with client_of(plane, "olaf") as olaf:  # who looks into processes is an operator of their namespace
            for path in ("/v1/config?of=a", "/v1/secrets?of=a"):
                assert (await olaf.get(path)).status_code == 404, path


async def test_traffic_is_seen_from_both_of_its_ends(plane: ControlPlane) -> None:
    """And nobody else's: not in the graph, nor in the series and traces."""
    now = time.time()
    inside = REVIEWS._replace(source_workload_namespace="dev")
    elsewhere = REVIEWS._replace(
        source_workload_namespace="prod", destination_workload_namespace="prod", destination_service_namespace="prod"
    )
    receiver = plane._picture.receiver
    receiver.metrics(metrics({inside: [5.0] * 60, elsewhere: [5.0] * 120}, now))
    receiver.traces(spans(("a", "01" * 8, "", now, 1.0, False)), SpiffeId.of("cluster.local", "dev", "a"))
    receiver.traces(spans(("b", "02" * 8, "01" * 8, now, 1.0, False)), SpiffeId.of("cluster.local", "prod", "b"))

    async def seen(name: str) -> tuple[set[str], float, int]:
        async with client_of(plane, name) as client:
            graph = (await client.get("/v1/graph?services=false")).json()
            (head,) = (await client.get("/v1/traces")).json()["traces"] or [{"spans": 0}]
            series = (await client.get("/v1/series?node=workload:prod/reviews-v1")).json()["points"]
        return (
            {node["namespace"] for node in graph["nodes"]},
            sum(point["rates"]["rps"] for point in series),
            head["spans"],
        )

    namespaces, rps, count = await seen("alice")
    assert (namespaces, rps > 0, count) == ({"default", "dev", "prod"}, True, 2)
    assert await seen("dora") == ({"default", "dev"}, 0, 1)
    assert await seen("vera") == ({"default", "dev"}, 0, 0)


async def test_every_route_is_known_to_the_gate(plane: ControlPlane) -> None:
    """One that is not asks for everything; so what is listed as checking by itself is what was looked at here."""
    assert plane._admin is not None
    routes = plane._admin._server.config.app.routes  # type: ignore[union-attr]
    changing = {route.path for route in routes if "POST" in route.methods}
    reading = {route.path for route in routes if "GET" in route.methods and route.path.startswith("/v1")}
    assert changing - CHECKED - PUSHED == {"/v1/login", "/v1/ca/rotate"}
    assert reading - NARROWED == {
        "/v1/services/{namespace}/{name}",
        "/v1/traces/{trace_id}",
        "/v1/changes/{number:int}",
    }


async def test_who_am_i_and_what_may_i(plane: ControlPlane) -> None:
    """With reasons that a person can read."""
    async with client_of(plane, "olaf") as olaf, client_of(plane, "nemo") as nemo:
        me = (await olaf.get("/v1/whoami")).json()
        assert (me["name"], me["method"], me["access"]) == ("token:olaf", "token", "controlled")
        assert me["may"]["steer"] == {
            "namespaces": ["default"],
            "reason": "needs the role operator; token:olaf has it in default",
        }
        assert me["may"]["apply"] == {"namespaces": [], "reason": "needs the role admin; token:olaf has not"}
        assert (await nemo.get("/v1/whoami")).json()["roles"] == []
        assert (await nemo.get("/v1/objects")).status_code == 403


async def test_the_page_signs_in_with_a_cookie(plane: ControlPlane) -> None:
    """HttpOnly, SameSite=Strict, Secure; a change needs the session's token in a header; it ends when it is told to."""
    origin = plane.local_admin_url
    async with client_of(plane) as client:
        bad = await client.post("/v1/login", json={"token": "mat_no"}, headers={"origin": origin})
        assert bad.status_code == 401
        form = await client.post("/v1/login", content='{"token": "x"}', headers={"content-type": "text/plain"})
        assert form.status_code == 415
        answer = await client.post("/v1/login", json={"token": TOKENS["olaf"]}, headers={"origin": origin})
        assert answer.status_code == 200
        cookie = answer.headers["set-cookie"].lower()
        assert all(word in cookie for word in ("httponly", "samesite=strict", "secure", "path=/"))
        assert TOKENS["olaf"] not in cookie
        csrf = (await client.get("/v1/whoami")).json()["csrf"]
        assert csrf == answer.json()["csrf"]
        text = VIRTUAL_SERVICE.replace("NAMESPACE", "default")
        for headers, status in (
            ({}, 403),
            ({CSRF: "guess"}, 403),
            ({CSRF: csrf, "origin": "https://evil.example"}, 403),
            ({CSRF: csrf, "origin": "null"}, 403),
            ({CSRF: csrf, "sec-fetch-site": "same-site"}, 403),
            ({CSRF: csrf, "origin": origin}, 200),
        ):
            sent = await client.post("/v1/apply", content=text, headers={**YAML, **headers})
            assert sent.status_code == status, headers
        kept = client.cookies[COOKIE]
        assert (await client.post("/v1/logout", headers={CSRF: csrf})).status_code == 204
        assert (await client.get("/v1/objects", headers={"cookie": f"{COOKIE}={kept}"})).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("192.0.2.7:443", 200),
        ("cp.example", 421),
        ("mesh.example:15014", 200),
        ("", 421),
        ("127.0.0.1:80/v1/login?", 421),
        ("[::1]/v1/login?", 421),
        ("mesh.example@evil.example", 421),
    ],
)
async def test_only_our_names_are_served(tmp_path: Path, host: str, status: int) -> None:
    """Those of the certificate, and addresses, which nobody can rebind."""
    async with running(settings_of(tmp_path, names=("mesh.example",))) as plane, client_of(plane, "alice") as client:
        assert (await client.get("/v1/objects", headers={"host": host})).status_code == status


async def test_a_token_that_is_taken_out_is_good_no_more(tmp_path: Path) -> None:
    """Nor a session or a stream that was begun with it; a bad edit takes nothing out."""
    async with running(settings_of(tmp_path)) as plane, client_of(plane) as page, client_of(plane, "olaf") as olaf:
        assert plane._administrators is not None and plane._administrators.access is not None
        file = plane._administrators.access
        assert (await page.post("/v1/login", json={"token": TOKENS["olaf"]})).status_code == 200
        assert (await page.get("/v1/objects")).status_code == 200
        (tmp_path / "access" / "access.yaml").write_text("grants: nonsense")
        file._looked = 0.0
        assert (await olaf.get("/v1/objects")).status_code == 200
        async with client_of(plane, "alice") as alice:
            (problem,) = (await alice.get("/v1/problems")).json()["problems"]
        assert problem["source"] == str(tmp_path / "access" / "access.yaml")
        assert "grants" in problem["reason"] and "stay in force" in problem["reason"]
        async with page.stream("GET", "/v1/stream") as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("event")
            write_access(tmp_path / "access", names=[name for name in TOKENS if name != "olaf"])
            text = (tmp_path / "access" / "access.yaml").read_text()
            kept = [line for line in text.splitlines() if "olaf" not in line]
            (tmp_path / "access" / "access.yaml").write_text("\n".join(kept))
            file._looked = 0.0
            assert (await olaf.get("/v1/objects")).status_code == 401
            async with asyncio.timeout(30):
                async for _ in lines:
                    pass
        assert (await page.get("/v1/objects")).status_code == 401


async def test_the_meshs_own_identities(plane: ControlPlane, tmp_path: Path) -> None:
    """By a proof in the header, once; by a client certificate; and of a foreign CA by neither."""
    assert plane.authority is not None
    credentials = workload(plane, CI)
    async with client_of(plane) as client:
        proof = {"authorization": f"Bearer {prove(credentials, time.time())}"}
        assert (await client.get("/v1/whoami", headers=proof)).json()["name"] == CI.uri
        assert (await client.get("/v1/whoami", headers=proof)).status_code == 401
        foreign = {"authorization": f"Bearer {prove(TestCA().credentials(CI), time.time())}"}
        assert (await client.get("/v1/whoami", headers=foreign)).status_code == 401
    async with client_of(plane, certificate=files_of(tmp_path, credentials)) as client:
        me = (await client.get("/v1/whoami")).json()
        assert (me["name"], me["method"]) == (CI.uri, "certificate")
        assert (await apply(client, VIRTUAL_SERVICE, "default")).status_code == 200
        assert (await apply(client, VIRTUAL_SERVICE, "dev")).status_code == 403
        crossed = await client.post("/v1/apply", headers={**YAML, "origin": "https://evil.example"})
        assert crossed.status_code == 403
    nobody = SpiffeId.of("cluster.local", "default", "reviews")
    async with client_of(plane, certificate=files_of(tmp_path, workload(plane, nobody))) as client:
        assert (await client.get("/v1/objects")).status_code == 403
    async with client_of(plane, certificate=files_of(tmp_path, TestCA().credentials(CI))) as client:
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            await client.get("/v1/objects")


async def test_certificates_of_people(tmp_path: Path) -> None:
    """Known by their common name, by the roots of the file; a SPIFFE ID in one of them is no identity of the mesh."""
    people = TestCA("people.example")
    folder = tmp_path / "access"
    folder.mkdir()
    (folder / "people.pem").write_bytes(people.root)
    more = (
        "- {role: admin, to: ['cn:carol', 'spiffe://cluster.local/ns/ops/sa/ci'], namespaces: ['*']}\n"
        "certificates: {roots: people.pem}\n"
    )
    async with running(settings_of(tmp_path, more)) as plane:
        for name, uris, status in (("carol", (), 200), ("mallory", (), 403), ("", (CI.uri,), 401)):
            chain, key = people.issue(common_name=name, uris=uris)
            (tmp_path / "chain.pem").write_bytes(chain)
            (tmp_path / "key.pem").write_bytes(key)
            async with client_of(plane, certificate=(tmp_path / "chain.pem", tmp_path / "key.pem")) as client:
                assert (await client.get("/v1/objects")).status_code == status, name


async def test_people_of_an_oidc_provider(tmp_path: Path) -> None:
    """By their claim and groups; what it says of service accounts is nothing here."""
    key, other = (RSAKey.generate_key(2048, {"kid": "one"}) for _ in range(2))
    folder = tmp_path / "access"
    folder.mkdir()
    (folder / "keys.json").write_text(json.dumps(KeySet([key]).as_dict(private=False)))
    more = (
        "- {role: operator, to: ['group:corp/sre'], namespaces: [default]}\n"
        "- {role: viewer, to: ['user:corp/jane@example.org'], namespaces: [default]}\n"
        "- {role: admin, to: ['spiffe://cluster.local/ns/ops/sa/ci'], namespaces: ['*']}\n"
        "issuers:\n"
        "- {name: corp, issuer: 'https://login.example', audience: meshlib, jwks: keys.json, subject: email}\n"
    )
    now = int(time.time())
    jane = {
        "iss": "https://login.example",
        "aud": "meshlib",
        "sub": "1",
        "exp": now + 600,
        "email": "jane@example.org",
        "email_verified": True,
    }
    async with running(settings_of(tmp_path, more)) as plane, client_of(plane) as client:

        async def status(claims: dict[str, Any], signer: RSAKey = key) -> tuple[int, list[str]]:
            token = jwt.encode({"alg": "RS256", "kid": "one"}, claims, signer)
            answer = await client.get("/v1/whoami", headers={"authorization": f"Bearer {token}"})
            return answer.status_code, [each["role"] for each in answer.json().get("roles", ())]

        assert await status(jane) == (200, ["viewer"])
        assert await status({**jane, "groups": ["sre"]}) == (200, ["operator", "viewer"])
        assert await status({**jane, "groups": "sre"}) == (200, ["viewer"])
        assert await status({**jane, "email_verified": False}) == (401, [])
        assert await status({**jane, "email": "eve@example.org"}) == (200, [])
        assert await status({**jane, "aud": "bank"}) == (401, [])
        assert await status({**jane, "exp": now - 3600}) == (401, [])
        assert await status(jane, other) == (401, [])
        account = {**jane, "sub": "system:serviceaccount:ops:ci", "email": "eve@example.org"}
        assert await status(account) == (200, [])


async def test_loopback_may_have_access_control_too(tmp_path: Path) -> None:
    """Plain HTTP, and the cookie without Secure: a browser would not keep it otherwise."""
    settings = settings_of(tmp_path, admin=("127.0.0.1", 0))
    async with running(settings) as plane, client_of(plane) as client:
        assert plane.admin_url.startswith("http://")
        assert (await client.get("/v1/objects")).status_code == 401
        answer = await client.post("/v1/login", json={"token": TOKENS["vera"]})
        assert "secure" not in answer.headers["set-cookie"].lower()
        assert (await client.get("/v1/objects")).status_code == 200


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("grants: [{role: king, to: ['token:alice'], namespaces: ['*']}]", "grants[0].role: 'king'"),
        ("grants: [{role: admin, to: ['token:mallory'], namespaces: ['*']}]", "no such token"),
        ("grants: [{role: admin, to: [alice], namespaces: ['*']}]", "is none of token:NAME"),
        ("grants: [{role: admin, to: ['cn:alice'], namespaces: ['*']}]", "certificates.roots"),
        ("grants: [{role: admin, to: ['user:corp/jane'], namespaces: ['*']}]", "`issuers`"),
        ("grants: [{role: admin, to: ['token:alice'], namespaces: []}]", "namespaces"),
        ("grants: [{role: admin, to: ['token:alice'], namespaces: ['De*']}]", "De*"),
        ("grants: [{rolle: admin}]", "rolle"),
        ("grants: []\nissuers: [{name: a, issuer: b, audience: c, jwks: 'http://x.example/k'}]", "https"),
        ("grants: []\nissuers: [{name: a, issuer: b, audience: c, jwks: k, algorithms: [HS256]}]", "HS256"),
        ("grants: [", "is no YAML"),
        ("", "grants"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, told: str) -> None:
    """File, field, and what is wrong."""
    file = write_access(tmp_path)
    file.write_text(f"tokens: tokens.yaml\n{text}")
    with pytest.raises(StateError) as error:
        read_rules(file)
    assert str(file) in str(error.value)
    assert told in str(error.value)


def test_what_others_can_write_is_no_rule(tmp_path: Path) -> None:
    """Neither of the two files."""
    file = write_access(tmp_path)
    for each in (file, tmp_path / "tokens.yaml"):
        each.chmod(0o664)
        with pytest.raises(StateError, match="written by others"):
            AccessFile(file)
        each.chmod(0o600)
    assert AccessFile(file).rules().tokens


async def test_a_bad_access_file_is_an_error_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not a control plane that lets nobody in, or everybody."""
    caplog.set_level(logging.DEBUG)
    settings = settings_of(tmp_path)
    assert settings.access is not None
    settings.access.write_text("grants: nonsense")
    plane = ControlPlane(settings)
    with pytest.raises(StateError, match=r"access\.yaml"):
        await plane.start()
    await plane.stop()


def files_of(folder: Path, credentials: Credentials) -> tuple[Path, Path]:
    chain, key = folder / "tls.crt", folder / "tls.key"
    chain.write_bytes(credentials.certificate_chain)
    key.write_bytes(credentials.private_key)
    return chain, key


@pytest.mark.parametrize("host", ["127.0.0.1/v1/login?", "[::1]/dashboard/?", "localhost:1/healthz#"])
async def test_a_host_header_is_no_path(tmp_path: Path, host: str) -> None:
    """Who is asked goes by the path of the request alone, in its very bytes."""
    settings = settings_of(tmp_path, admin=("127.0.0.1", 0))
    async with running(settings) as plane:
        port = int(plane.admin_url.rpartition(":")[2])
        for method, target in (("GET", "/v1/objects"), ("POST", "/v1/ca/rotate?step=begin"), ("GET", "//v1/objects")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"{method} {target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            writer.write(head.encode())
            async with asyncio.timeout(30):
                answer = await reader.read()
            writer.close()
            assert answer.split(b" ")[1] in (b"400", b"421"), answer


@pytest.mark.parametrize(
    ("path", "action", "read"),
    [("/v1/tap?name=reviews", "tap", "requests"), ("/v1/logs/follow?name=reviews", "logs", "logs")],
)
async def test_looking_on_is_an_operators_in_its_namespace(
    plane: ControlPlane, path: str, action: str, read: str
) -> None:
    """Since processes tell of more while it lasts; refusals are in the audit log. What is there may be read by all who
    see the namespace."""
    async with client_of(plane, "vera") as vera, client_of(plane, "olaf") as olaf, client_of(plane, "alice") as alice:
        assert (await vera.post(path, headers=YAML)).status_code == 403
        assert (await olaf.post(f"{path}&namespace=dev", headers=YAML)).status_code == 403
        assert (await olaf.post(path, headers=YAML)).status_code == 404  # nobody is connected
        assert (await olaf.post(path)).status_code == 415
        assert (await olaf.post(f"{path}&rate=0", headers=YAML)).status_code == 400
        assert (await vera.get(f"/v1/{read}")).json() in ({"requests": []}, {"lines": []})
        entries = (await alice.get("/v1/audit")).json()["entries"]
        assert [(each["who"], each["outcome"]) for each in entries if each["action"] == action] == [
            ("token:vera", "denied"),
            ("token:olaf", "denied"),
        ]
