"""Who tries to get in by other ways than the door? Each attempt over a real socket, at every edge: refused, and logged.

What a port refuses within the handshake is in tests/inbound/test_mtls_ports.py, what CA and control plane refuse in
tests/controlplane/test_identity_over_the_wire.py, what the gateway refuses of a request's framing, slow and large heads
in tests/gateway/test_gateway_protocol.py; of the framing some is here, where the end of the connection counts.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import re
import socket
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from joserfc import jwt
from joserfc.jwk import RSAKey

from certificates import TestCA
from inbound.inbound_servers import _Server
from meshlib.identity.tls import TlsContexts
from meshlib.inbound.serve import Listening
from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.model import Inbound, Node, Snapshot, SpiffeId, TlsMode, UpstreamTls, Workload
from peers import Answer, Peer
from security.edges import EDGES, asgi_app, by_gateway, exchange
from snapshots import mesh

edges = pytest.mark.parametrize("edge", EDGES)


def rules(*specs: str, kind: str = "AuthorizationPolicy") -> Inbound:
    text = "---\n".join(
        f"apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p{n}, namespace: default}}\nspec: {spec}\n"
        for n, spec in enumerate(specs)
    )
    parsed = parse_text(text, "attacks.yaml")
    assert not parsed.problems, parsed.problems
    return translate(parsed.objects, (), Node("n", Workload("reviews"))).snapshot.inbound[0]


def get(at: str, target: str, *lines: str, host: str = "reviews") -> tuple[int, bytes]:
    head = "\r\n".join((f"GET {target} HTTP/1.1", f"Host: {host}", "Connection: close", *lines, "", ""))
    return exchange(at, head.encode("latin-1"))


# Paths


PATHS = [
    "/admin", "/admin/", "/admin/x", "/admin?x=1", "/admin;x", "/admin#x", "//admin", "///admin", "/./admin",
    "/.//admin",
    "/open/../admin", "/open/./../admin", "/open//../../admin", "/open/..//admin", "/%61dmin", "/%61%64%6d%69%6e",
    "/open/%2e%2e/admin", "/open/%2E%2E/admin", "/open/.%2e/admin", "/open/%2e./admin", "/open/..%2fadmin",
    "/open/..%2Fadmin", "/open%2f..%2fadmin", "/%2fadmin", "/%2Fadmin", "//%2fadmin", "/\\admin", "/open\\..\\admin",
    "/open/..\\admin", "/open/%5c..%5cadmin", "/open/..%5cadmin", "/%5cadmin", "/admin%20", "/admin%00", "/admin%2f",
    "/admin/..%2fadmin", "/open/x/../../admin", "/open/%2e%2e%2fadmin", "/..%2f..%2fadmin", "/..//admin",
    "/open/;/../admin", "/open/..;/admin", "/ADMIN", "/Admin", "/%41dmin", "/open/%252e%252e/admin", "/%2561dmin",
    "/admin%3fx", "/admin%23x", "http://reviews/admin", "http://reviews//admin", "/open/../../../../admin",
]  # fmt: skip


def reaches_admin(path: str) -> bool:
    """What an application that is careless with slashes and dots would take for /admin, from the path it is given."""
    parts: list[str] = []
    for part in re.split(r"[/\\]+", path):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(part)
    return bool(parts) and re.split(r"[\x00 ?#;]", parts[0])[0] == "admin"


@edges
@pytest.mark.parametrize(
    "spec",
    [
        "{action: DENY, rules: [{to: [{operation: {paths: ['/admin*']}}]}]}",
        "{action: ALLOW, rules: [{to: [{operation: {paths: ['/open*']}}]}]}",
        "{action: ALLOW, rules: [{to: [{operation: {notPaths: ['/admin*']}}]}]}",
        "{action: ALLOW, rules: [{to: [{operation: {paths: ['/open/{**}']}}]}]}",
    ],
    ids=["deny", "allow others", "not", "template"],
)
def test_no_spelling_of_a_path_gets_past_a_rule(edge: Any, spec: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever way it is written: refused, or the application is not asked for what the rule protects."""
    caplog.set_level(logging.INFO, "meshlib.guard")
    passed, refused = [], 0
    with edge(rules(spec)) as at:
        assert get(at, "/open/x")[0] == 200
        for target in PATHS:
            status, body = get(at, target)
            if status == 200 and reaches_admin(json.loads(body)["path"]):
                passed.append((target, json.loads(body)["path"]))
            refused += status == 403
    assert passed == []
    assert refused > 20
    logged = [each for each in caplog.messages if "403 rbac_access_denied" in each]
    assert len(logged) == refused


@edges
def test_no_spelling_of_a_host_gets_past_a_rule(edge: Any) -> None:
    """Case and a dot at the end make no other host. A port does, as in Istio: write both, or `admin.example*`."""
    deny = "{action: DENY, rules: [{to: [{operation: {hosts: [admin.example, 'admin.example:*']}}]}]}"
    allow = "{action: ALLOW, rules: [{to: [{operation: {hosts: [open.example]}}]}]}"
    hosts = (
        "admin.example",
        "ADMIN.example",
        "admin.example.",
        "Admin.Example.",
        "admin.example:80",
        "admin.example.:80",
    )
    with edge(rules(deny)) as at:
        assert get(at, "/", host="open.example")[0] == 200
        for host in hosts:
            assert get(at, "/", host=host)[0] == 403, host
        # Of two hosts, the one that was judged is the one that the application is told.
        status, body = get(at, "http://admin.example/", host="open.example")
        assert status in (400, 403) or json.loads(body)["headers"]["host"] == "open.example"
    with edge(rules(allow)) as at:
        assert get(at, "/", host="OPEN.example")[0] == 200
        for host in (*hosts, "open.example.", "open.example:80", "open.example.evil"):
            assert get(at, "/", host=host)[0] == 403, host


# Identity


@edges
@pytest.mark.parametrize(
    "line",
    [
        "X-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/default/sa/bank",
        "x_forwarded_client_cert: URI=spiffe://cluster.local/ns/default/sa/bank",
        'X-Forwarded-Client-Cert: By=spiffe://cluster.local/x;Hash=0;Subject="";URI=spiffe://cluster.local/ns/default/sa/bank',
        "X-Forwarded-Client-Cert: URI=spiffe://cluster.local/ns/default/sa/bank\r\nX-Forwarded-Client-Cert: URI=spiffe://a/b",
    ],
)
def test_an_identity_is_no_header(edge: Any, line: str) -> None:
    """It gives no principal, and the application never sees it: a certificate is what proves, and nothing else."""
    bank = "{rules: [{from: [{source: {principals: ['cluster.local/ns/default/sa/bank']}}]}]}"
    with edge(rules(bank)) as at:
        assert get(at, "/", line)[0] == 403
    with edge(rules("{rules: [{}]}")) as at:
        status, body = get(at, "/", line)
        assert status in (200, 400)  # some servers refuse names with an underscore by themselves
        assert b"spiffe" not in body


@contextlib.contextmanager
def secured(given: Inbound, ca: TestCA) -> Iterator[int]:
    """An application behind mTLS and rules."""
    server = ca.credentials("reviews")
    with mesh(Snapshot(inbound=(given,), complete=True)) as made:
        listening = Listening(TlsContexts(lambda: server, has_identity=True), lambda port: TlsMode.STRICT, 10.0)
        config = uvicorn.Config(made.asgi(asgi_app), log_level="critical", lifespan="off", http=listening.uvicorn)
        running = _Server(config)
        with socket.create_server(("127.0.0.1", 0)) as port:
            thread = threading.Thread(target=running.run, args=([port],), name="uvicorn")
            thread.start()
            try:
                assert running.is_up.wait(10)
                yield port.getsockname()[1]
            finally:
                running.should_exit = True
                thread.join(20)
                assert not thread.is_alive()


def test_the_right_authority_and_another_identity_is_not_enough(caplog: pytest.LogCaptureFixture) -> None:
    """The handshake is good, the rule is about somebody else: refused with the caller's name in the log."""
    caplog.set_level(logging.INFO, "meshlib.guard")
    ca = TestCA()
    bank = "{rules: [{from: [{source: {principals: ['cluster.local/ns/default/sa/bank']}}]}]}"
    names = [
        (SpiffeId.of("cluster.local", "default", "bank"), 200),
        (SpiffeId.of("cluster.local", "default", "banker"), 403),
        (SpiffeId.of("cluster.local", "other", "bank"), 403),
        (SpiffeId("cluster.local", "ns/default/sa/bank/x"), 403),
        (SpiffeId("cluster.local", "x/ns/default/sa/bank"), 403),
        (SpiffeId("cluster.local", "ns/default/sa/BANK"), 403),
    ]
    with secured(rules(bank), ca) as port:
        for who, status in names:
            known = ca.credentials(who)
            expected = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=("spiffe://cluster.local/ns/default/sa/reviews",))
            context = TlsContexts(lambda known=known: known, has_identity=True).client(expected)
            with httpx.Client(verify=context, trust_env=False, timeout=20) as client:
                assert client.get(f"https://127.0.0.1:{port}/").status_code == status, who
            assert status == 200 or f"from {who.uri}: 403" in caplog.text


# Tokens


KEY, STRANGER = (RSAKey.generate_key(2048, {"kid": "one"}, auto_kid=False) for _ in range(2))


def token(key: RSAKey, **claims: Any) -> str:
    """By issuer `me`, for `us`."""
    said = {"iss": "me", "sub": "jane", "aud": "us", "exp": int(time.time()) + 600, **claims}
    return jwt.encode({"alg": "RS256", "kid": "one"}, said, key)


def _part(value: Any) -> str:
    return urlsafe_b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).rstrip(b"=").decode()


def _forgeries() -> dict[str, str]:
    good = {"iss": "me", "sub": "jane", "aud": "us", "exp": int(time.time()) + 600}
    head = {"alg": "RS256", "kid": "one"}

    def signed(claims: dict[str, Any] = good, key: RSAKey = KEY, **header: Any) -> str:
        return jwt.encode({**head, **header}, claims, key)

    def mac(secret: bytes) -> str:
        text = f"{_part({'alg': 'HS256', 'kid': 'one'})}.{_part(good)}"
        return f"{text}.{_part(hmac.digest(secret, text.encode(), 'sha256'))}"

    first, middle, last = signed().split(".")
    return {
        "none": f"{_part({'alg': 'none'})}.{_part(good)}.",
        "None": f"{_part({'alg': 'None', 'kid': 'one'})}.{_part(good)}.{last}",
        "no algorithm": f"{_part({'kid': 'one'})}.{middle}.{last}",
        "HS256 with the public key": mac(KEY.as_pem(private=False)),
        "HS256 with nothing": mac(b""),
        "another's signature": signed(key=STRANGER),
        "another payload": f"{first}.{_part({**good, 'sub': 'root'})}.{last}",
        "another header": f"{_part({'alg': 'RS512', 'kid': 'one'})}.{middle}.{last}",
        "no signature": f"{first}.{middle}.",
        "half a signature": f"{first}.{middle}.{last[: len(last) // 2]}",
        "audience": signed({**good, "aud": "them"}),
        "no audience": signed({name: value for name, value in good.items() if name != "aud"}),
        "issuer": signed({**good, "iss": "them"}),
        "issuers": signed({**good, "iss": ["me"]}),
        "expired": signed({**good, "exp": int(time.time()) - 3600}),
        "not yet": signed({**good, "nbf": int(time.time()) + 3600}),
        "no number": signed({**good, "exp": str(good["exp"])}),
        "kid is a file": signed(key=STRANGER, kid="../../../../dev/null"),
        "kid is a query": signed(key=STRANGER, kid="' UNION SELECT 'x"),
        "kid is long": signed(key=STRANGER, kid="k" * 2000),
        "own key in the header": signed(key=STRANGER, jwk=STRANGER.as_dict(private=False)),
        "own keys by URL": signed(key=STRANGER, jku="http://127.0.0.1:1/keys"),
        "own certificate": signed(key=STRANGER, x5u="http://127.0.0.1:1/cert"),
        "critical": f"{_part({**head, 'crit': ['exp'], 'exp': 1})}.{middle}.{last}",
        "not encoded": f"{_part({**head, 'b64': False})}.{middle}.{last}",
        "five parts": f"{first}.{middle}.{last}.a.b",
        "two parts": f"{first}.{middle}",
        "deep": f"{_part(b'[' * 5000)}.{middle}.{last}",
        "no object": f"{_part([1])}.{middle}.{last}",
        "padding": f"{first}=.{middle}.{last}",
        "empty": "..",
        "huge": "a" * 20_000 + ".b.c",
    }


@edges
def test_no_forged_token_is_taken(edge: Any, caplog: pytest.LogCaptureFixture) -> None:
    """401 or 403, each in the log, and nothing of any token there; a good one is taken after them all."""
    caplog.set_level(logging.INFO)
    forgeries = _forgeries()
    good = token(KEY)
    keys = json.dumps({"keys": [KEY.as_dict(private=False)]})
    with Peer(lambda _: Answer(body=keys.encode())) as issuer:
        uri = f"http://127.0.0.1:{issuer.port}/keys"
        given = rules(
            f"{{jwtRules: [{{issuer: me, audiences: [us], jwksUri: '{uri}'}}]}}", kind="RequestAuthentication"
        )
        with edge(given) as at:
            for name, text in forgeries.items():
                status, body = get(at, "/", f"Authorization: Bearer {text}")
                assert status in (401, 403, 431), (name, status, body)
            assert get(at, "/", f"Authorization: Bearer {good}")[0] == 200
    assert {each.target for each in issuer.received} == {"/keys"} and len(issuer.received) <= 3
    logged = [each for each in caplog.messages if "jwt_authn_access_denied" in each]
    assert len(logged) >= len(forgeries) - 2  # a head that is too large is no request yet
    assert not [name for name, text in forgeries.items() if len(text) > 50 and text[-40:] in caplog.text]


# Framing


SMUGGLED = [
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n",
    b"GET /\tHTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1 \r\nHost: a\r\nContent-Length : 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \tchunked, x\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\nabcdefghij",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\n0\n\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;x\ny\r\na\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\na\r\n0\r\n\r\n",
]


def test_no_framing_that_two_servers_may_read_differently_passes_the_gateway(caplog: pytest.LogCaptureFixture) -> None:
    """Refused and logged; the connection ends, so that what follows in it is nobody's request."""
    caplog.set_level(logging.INFO, "meshlib.gateway")
    follows = b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n"
    with by_gateway(rules("{rules: [{}]}")) as at:
        for number, given in enumerate(SMUGGLED, 1):
            status, rest = exchange(at, given, follows)
            assert status in (400, 501), (given, status)
            assert b"HTTP/1.1 200" not in rest, given
            assert sum("refused with" in each for each in caplog.messages) == number, given
