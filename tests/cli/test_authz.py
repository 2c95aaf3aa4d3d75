"""Does meshctl authz check say what the workload would, and which rule in which file says so?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey
from typer.testing import CliRunner

import meshlib
from dashboard.pictured_town import Town
from meshlib.cli.app import app

POLICIES = """apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews}
spec:
  selector: {matchLabels: {app: reviews}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/productpage]}}]
    to: [{operation: {methods: [GET], paths: ["/reviews/*"]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-testers}
spec:
  action: DENY
  rules:
  - from: [{source: {namespaces: [test]}}]
  - from: [{source: {ipBlocks: [10.9.0.0/16]}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: reviews-v1}
spec:
  template:
    metadata: {labels: {app: reviews, version: v1}}
    spec: {serviceAccountName: reviews}
"""
PRODUCTPAGE = "cluster.local/ns/default/sa/productpage"


def check(*words: str, stdin: str = "") -> Result:
    empty = {"MESHCTL_ADMIN": "", "MESHLIB_TOKEN": ""}
    return CliRunner().invoke(app, ["authz", "check", *words], env=empty, input=stdin)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "security.yaml").write_text(POLICIES)
    return str(tmp_path / "security.yaml")


@pytest.mark.parametrize(
    ("words", "allowed", "told"),
    [
        (("--from", PRODUCTPAGE, "--path", "/reviews/0"), True, "AuthorizationPolicy default/reviews ("),
        (("--from", "default/productpage", "--path", "/reviews/0"), True, "ns[default]-policy[reviews]-rule[0]"),
        (("--from", f"spiffe://{PRODUCTPAGE}", "--path", "/other"), False, "no rule allows it"),
        (("--from", PRODUCTPAGE, "-X", "POST", "--path", "/reviews/0"), False, "no rule allows it"),
        (("--from", "test", "--path", "/reviews/0"), False, "AuthorizationPolicy default/no-testers ("),
        (("--from", PRODUCTPAGE, "--from", "10.9.0.1", "--path", "/reviews/0"), False, "no-testers]-rule[1]"),
        (("--path", "/reviews/0"), False, "somebody in plaintext"),
    ],
)
def test_by_files(file: str, words: tuple[str, ...], allowed: bool, told: str) -> None:
    """Labels come from the manifest of this name; the file and line of the policy are told."""
    found = check("reviews-v1", "-f", file, *words)
    assert found.exit_code == (0 if allowed else 1), found.output
    assert found.stdout.startswith("ALLOWED: " if allowed else "DENIED: ")
    assert told in found.stdout
    machine = json.loads(check("reviews-v1", "-f", file, *words, "-o", "json").stdout)
    assert machine["allowed"] is allowed
    assert all("security.yaml:" in each["from"] for each in machine["by"])
    assert len(machine["rules"]) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nobody", "-f", "FILE"), "--labels app=reviews"),
        (("reviews-v1", "-f", "FILE", "--from", "a/b/c"), "is no principal"),
        (("reviews-v1", "-f", "FILE", "--from", "a", "--from", "b"), "one identity"),
        (("reviews-v1", "-f", "FILE", "--header", "x"), "NAME: VALUE"),
        (("reviews-v1", "-f", "FILE", "--labels", "x"), "app=reviews"),
        (("reviews-v1", "-f", "FILE", "--jwt", "@nowhere"), "--jwt @nowhere"),
    ],
)
def test_what_can_not_be_decided_is_told(file: str, words: tuple[str, ...], told: str) -> None:
    """In a sentence, with the option."""
    found = check(*(file if each == "FILE" else each for each in words))
    assert found.exit_code == 1
    assert told in found.stderr
    assert found.stderr.startswith("error: ")


def test_with_a_token(tmp_path: Path) -> None:
    """Of an issuer whose keys stand in the object: claims count, a bad one is refused with its reason."""
    key, other = (RSAKey.generate_key(2048, {"kid": "one"}) for _ in range(2))
    keys = json.dumps(KeySet([key]).as_dict(private=False))
    (tmp_path / "jwt.yaml").write_text(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: jwt}\nspec:\n"
        f"  jwtRules: [{{issuer: me, jwks: '{keys}'}}]\n---\n"
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: admins}\nspec:\n"
        "  rules: [{when: [{key: 'request.auth.claims[group]', values: [admin]}]}]\n"
    )

    def checked(signer: RSAKey, group: str) -> Result:
        token = jwt.encode({"alg": "RS256", "kid": "one"}, {"iss": "me", "sub": "j", "group": group}, signer)
        return check("x", "-f", str(tmp_path), "--labels", "app=x", "--jwt", "-", stdin=token)

    assert checked(key, "admin").exit_code == 0
    assert "no rule allows it" in checked(key, "guest").stdout
    assert "verification" in checked(other, "admin").stdout.lower()


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    folder = tmp_path / "mesh"
    folder.mkdir()
    (folder / "security.yaml").write_text(POLICIES)
    with Town(folder) as made:
        yield made


async def test_by_what_a_running_process_was_sent(town: Town) -> None:
    """The rules in force there, and the object's file, through the wire."""
    with meshlib.connect(
        town.target,
        service="reviews",
        workload="reviews-v1",
        labels=(("app", "reviews"), ("version", "v1")),
        cache_dir="-",
        telemetry="off",
    ) as mesh:
        mesh.asgi(lambda scope, receive, send: None)
        await asyncio.to_thread(mesh.start)
        async with asyncio.timeout(60):
            while True:
                words = ("reviews-v1", "--from", PRODUCTPAGE, "--path", "/reviews/0", "--control-plane", town.url)
                found = await asyncio.to_thread(check, *words)
                if not found.stderr:
                    break
                await asyncio.sleep(0.1)
        assert found.exit_code == 0, found.output
        assert "by ns[default]-policy[reviews]-rule[0]: AuthorizationPolicy default/reviews (" in found.stdout
        assert "security.yaml:7)" in found.stdout
    gone = ("other", "--labels", "app=reviews", "--from", "test", "--control-plane", town.url)
    denied = await asyncio.to_thread(check, *gone)
    assert "AuthorizationPolicy default/no-testers (" in denied.stdout, denied.output
    assert denied.exit_code == 1
