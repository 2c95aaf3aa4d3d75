"""May a route depend on what a token says? At a gateway, once the token is verified; elsewhere that is reported."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import httpx
import pytest
from gateways import gateway, raw, url
from joserfc import jwt
from joserfc.jwk import RSAKey

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import Translation, translate
from meshlib.model import ClaimMatch, Headers, Node, NodeKind, Request, StringMatch, Workload
from meshlib.policy.live import compile_live

KEY = RSAKey.generate_key(2048, {"kid": "one"}, auto_kid=False)
JWKS = json.dumps({"keys": [KEY.as_dict(private=False)]})
YAML = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: door, namespace: istio-system}
spec: {selector: {istio: gw}, servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: ['*']}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: istio-system}
spec: {jwtRules: [{issuer: me, jwks: '%s'}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: claims, namespace: istio-system}
spec:
  hosts: ['%s']
  gateways: [%s]
  http: %s
"""


def translated(http: str, gateways: str = "door", kind: NodeKind = NodeKind.ROUTER, host: str = "*") -> Translation:
    parsed = parse_text(YAML % (JWKS, host, gateways, http), "claims.yaml")
    assert parsed.problems == ()
    node = Node("n", Workload("gw", "istio-system", labels=(("istio", "gw"),)), kind)
    return translate(parsed.objects, (), node)


def rule(kind: str, name: str, match: str, status: int) -> str:
    return f"{{match: [{{{kind}: {{'{name}': {match}}}}}], directResponse: {{status: {status}}}}}"


ROUTES = ", ".join(
    [
        rule("headers", "@request.auth.claims.group", "{exact: admin}", 201),
        rule("headers", "@request.auth.claims[a.b][C]", "{prefix: x}", 202),
        rule("headers", "@request.auth.claims.deep.er", "{regex: '[0-9]+'}", 203),
        rule("withoutHeaders", "@request.auth.claims.sub", "{}", 204),
        "{directResponse: {status: 205}}",
    ]
)


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        (None, 204),
        ({}, 204),
        ({"sub": "jane"}, 205),
        ({"sub": "jane", "group": "admin"}, 201),
        ({"sub": "jane", "group": ["user", "admin"]}, 201),
        ({"sub": "jane", "group": "administrator"}, 205),
        ({"sub": "jane", "Group": "admin"}, 205),
        ({"sub": "jane", "a.b": {"C": "xyz"}}, 202),
        ({"sub": "jane", "a.b": {"c": "xyz"}}, 205),
        ({"sub": "jane", "deep": {"er": "42"}}, 203),
        ({"sub": "jane", "deep": {"er": "42a"}}, 205),
    ],
)
async def test_a_route_is_chosen_by_a_verified_claim(claims: dict[str, Any] | None, status: int) -> None:
    """Nested, in lists, with case; without a token there is no claim."""
    headers = {}
    if claims is not None:
        said = {"iss": "me", "exp": int(time.time()) + 600, **claims}
        headers["authorization"] = f"Bearer {jwt.encode({'alg': 'RS256', 'kid': 'one'}, said, KEY)}"
    made = translated(f"[{ROUTES}]")
    assert made.problems == ()
    async with gateway(made.snapshot) as door, httpx.AsyncClient(timeout=20) as client:
        assert (await client.get(url(door), headers=headers)).status_code == status


async def test_a_claim_is_never_a_header() -> None:
    """Whoever writes it as one gets nowhere: no header has such a name, and unverified tokens are refused."""
    stranger = jwt.encode({"alg": "RS256"}, {"iss": "me", "group": "admin"}, RSAKey.generate_key(2048))
    async with gateway(translated(f"[{ROUTES}]").snapshot) as door:
        for line, status in (
            ("@request.auth.claims.group: admin", 400),
            ("request.auth.claims.group: admin", 204),
            (f"Authorization: Bearer {stranger}", 401),
        ):
            async with raw(door) as client:
                await client.send("GET / HTTP/1.1", "Host: a", line)
                assert (await client.head())[0] == status, line


def test_within_the_mesh_claims_are_reported_and_never_hold() -> None:
    """Only valid at a gateway: a caller's process has verified no token."""
    made = translated(f"[{ROUTES}]", "mesh", NodeKind.SIDECAR, "a.internal")
    assert {(each.object, each.field) for each in made.problems} >= {
        ("VirtualService istio-system/claims", "spec.http[0].match")
    }
    router = compile_live(made.snapshot, None, random.Random(1)).router
    decision = router.match(Request("GET", "http", "a.internal", "/", Headers()))
    assert decision is not None and getattr(decision.action, "status", None) == 204


@pytest.mark.parametrize(
    "name",
    [
        "@request.auth.claims",
        "@request.auth.claims.",
        "@x",
        "@request.auth.claims[a",
        "@request.auth.claims.a..b",
        "@request.auth.claims[]",
    ],
)
def test_a_name_that_means_no_claim_is_refused(name: str) -> None:
    """With its place; it would never hold."""
    problems = parse_text(
        YAML % (JWKS, "*", "door", f"[{rule('headers', name, '{exact: a}', 200)}]"), "claims.yaml"
    ).problems
    assert [each.field for each in problems] == ["spec.http[0].match[0].headers"]


def test_the_two_forms_of_a_claim() -> None:
    """Dots part names, unless brackets do; the words before are read in any case, claims as they are."""
    made = translated(f"[{rule('headers', '@Request.Auth.Claims.a.B', '{exact: v}', 200)}]")
    (route,) = made.snapshot.route_configurations[0].virtual_hosts[0].routes
    assert route.match.claims == (ClaimMatch(("a", "B"), StringMatch("exact", "v")),)
