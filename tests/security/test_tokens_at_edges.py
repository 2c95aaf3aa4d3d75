"""What becomes of a caller's token? Found, verified by an issuer's fetched keys, taken away, told: at every edge."""

from __future__ import annotations

import json
import logging
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.model import Inbound, Node, Workload
from peers import Answer, Peer
from security.edges import EDGES

edges = pytest.mark.parametrize("edge", EDGES)
KEY = RSAKey.generate_key(2048, {"kid": "one"}, auto_kid=False)
JWKS = json.dumps({"keys": [KEY.as_dict(private=False)]})


def token(**claims: Any) -> str:
    said = {"iss": "https://issuer", "sub": "jane", "exp": int(time.time()) + 600, "scope": "read write", **claims}
    return jwt.encode({"alg": "RS256", "kid": "one"}, said, KEY)


def rules(rule: str, require: str = "", action: str = "ALLOW") -> Inbound:
    """A RequestAuthentication with one rule, and an AuthorizationPolicy of one rule."""
    text = f"""
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens, namespace: default}}
spec: {{jwtRules: [{{issuer: 'https://issuer', {rule}}}]}}
"""
    if require:
        text += f"""---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: required, namespace: default}}
spec: {{action: {action}, rules: [{require}]}}
"""
    parsed = parse_text(text, "tokens.yaml")
    assert not parsed.problems, parsed.problems
    return translate(parsed.objects, (), Node("n", Workload("reviews"))).snapshot.inbound[0]


@pytest.fixture(scope="module")
def jwks() -> Iterator[str]:
    with Peer(lambda _: Answer(body=JWKS.encode())) as peer:
        yield f"jwksUri: 'http://127.0.0.1:{peer.port}/keys'"


@edges
def test_a_token_admits_and_the_application_does_not_see_it(edge: Any, jwks: str) -> None:
    """requestPrincipals; forwardOriginalToken is false by default; a header for a claim is the mesh's word alone."""
    given = rules(
        f"{jwks}, outputClaimToHeaders: [{{header: x-user, claim: sub}}, {{header: x-deep, claim: a.b}}],"
        " outputPayloadToHeader: x-payload",
        "{from: [{source: {requestPrincipals: ['https://issuer/jane']}}]}",
    )
    forged = {"x-user": "root", "x_user": "root", "X-Deep": "forged", "x-payload": "forged"}
    with edge(given) as at, httpx.Client(timeout=20) as client:
        bearer = {"authorization": f"Bearer {token(a={'b': 7})}"}
        answer = client.get(f"{at}/", headers=forged | bearer)
        assert answer.status_code == 200, answer.text
        seen = answer.json()["headers"]
        assert (seen["x-user"], seen["x-deep"]) == ("jane", "7")
        assert "authorization" not in seen and "root" not in seen.values()
        payload = json.loads(urlsafe_b64decode(seen["x-payload"] + "=="))
        assert payload["sub"] == "jane"
        assert client.get(f"{at}/", headers=forged).status_code == 403  # no token: no principal
        assert client.get(f"{at}/", headers={"authorization": f"Bearer {token(sub='joe')}"}).status_code == 403


@edges
def test_without_a_policy_a_request_without_a_token_passes_and_forges_nothing(edge: Any, jwks: str) -> None:
    """RequestAuthentication alone asks for no token; a bad one is refused, with Envoy's words."""
    given = rules(f"{jwks}, outputClaimToHeaders: [{{header: x-user, claim: sub}}]")
    with edge(given) as at, httpx.Client(timeout=20) as client:
        answer = client.get(f"{at}/", headers={"x-user": "root", "x_user": "root"})
        assert answer.status_code == 200 and "root" not in answer.json()["headers"].values()
        refused = client.get(f"{at}/a?b=c", headers={"authorization": "Bearer a.b.c"})
        assert (refused.status_code, refused.text) == (401, "Jwt header is an invalid JSON")
        host = at.removeprefix("http://")
        wanted = f'Bearer realm="http://{host}/a", error="invalid_token"'
        assert refused.headers["www-authenticate"] == wanted


PLACES: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "Authorization": ("", lambda text: {"headers": {"authorization": f"Bearer {text}"}}),
    "access_token": ("", lambda text: {"params": {"access_token": text}}),
    "header": ("fromHeaders: [{name: x-jwt}]", lambda text: {"headers": {"x-jwt": text}}),
    "header and prefix": (
        "fromHeaders: [{name: x-jwt, prefix: 'JWT '}]",
        lambda text: {"headers": {"x-jwt": f"JWT {text}"}},
    ),
    "param": ("fromParams: [token, t]", lambda text: {"params": {"a": "1", "t": text}}),
    "cookie": ("fromCookies: [session]", lambda text: {"headers": {"cookie": f"a=b; session={text}; c=d"}}),
}


@edges
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_token_is_found_where_it_may_stand_and_taken_away_from_there(
    edge: Any, place: str, forward: bool, jwks: str
) -> None:
    """Headers, parameters, cookies; forwardOriginalToken leaves it where it stood. A cookie stays, as in Envoy."""
    where, put = PLACES[place]
    rule = ", ".join(part for part in (jwks, where, "forwardOriginalToken: true" if forward else "") if part)
    text = token()
    with edge(rules(rule, "{from: [{source: {requestPrincipals: ['*']}}]}")) as at, httpx.Client(timeout=20) as client:
        answer = client.get(f"{at}/", **put(text))
        assert answer.status_code == 200, answer.text
        seen = json.dumps(answer.json())
        assert (text in seen) is (forward or place == "cookie")
        if place == "param":
            assert answer.json()["query"].startswith("a=1")
        if where:  # it replaces the usual places
            assert client.get(f"{at}/", headers={"authorization": f"Bearer {text}"}).status_code == 403


@edges
@pytest.mark.parametrize(
    ("condition", "claims", "holds"),
    [
        ("{when: [{key: 'request.auth.claims[group]', values: [admin]}]}", {"group": "admin"}, True),
        ("{when: [{key: 'request.auth.claims[group]', values: [admin]}]}", {"group": ["user", "admin"]}, True),
        ("{when: [{key: 'request.auth.claims[group]', values: [admin]}]}", {"group": "administrator"}, False),
        ("{when: [{key: 'request.auth.claims[group]', values: ['adm*']}]}", {"group": "administrator"}, True),
        ("{when: [{key: 'request.auth.claims[a][b]', values: [x]}]}", {"a": {"b": "x"}}, True),
        ("{when: [{key: 'request.auth.claims[scope]', values: [write]}]}", {}, True),
        ("{when: [{key: 'request.auth.claims[scope]', values: ['read write']}]}", {}, False),
        ("{when: [{key: 'request.auth.audiences', values: [us]}]}", {"aud": ["them", "us"]}, True),
        ("{when: [{key: 'request.auth.presenter', values: [app]}]}", {"azp": "app"}, True),
        ("{when: [{key: 'request.auth.principal', values: ['*/jane']}]}", {}, True),
        ("{from: [{source: {requestPrincipals: ['https://issuer/*']}}]}", {}, True),
        ("{from: [{source: {requestPrincipals: ['https://other/*']}}]}", {}, False),
        ("{from: [{source: {notRequestPrincipals: ['https://issuer/jane']}}]}", {}, False),
    ],
)
def test_rules_read_what_the_token_says(edge: Any, condition: str, claims: dict[str, Any], holds: bool) -> None:
    """As ALLOW, and as DENY the other way round."""
    inline = f"jwks: '{JWKS}'"
    bearer = {"authorization": f"Bearer {token(**claims)}"}
    with httpx.Client(timeout=20) as client:
        for action in ("ALLOW", "DENY"):
            with edge(rules(inline, condition, action)) as at:
                assert (client.get(f"{at}/", headers=bearer).status_code == 200) is (holds == (action == "ALLOW"))


@edges
def test_an_issuer_that_is_down_lets_nobody_in_and_says_so(edge: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Refused, not let through; the log names the issuer, and holds nothing of the token."""
    caplog.set_level(logging.INFO)
    text = token()
    with Peer(lambda _: Answer(503)) as peer, edge(rules(f"jwksUri: 'http://127.0.0.1:{peer.port}/'")) as at:
        answer = httpx.get(f"{at}/", headers={"authorization": f"Bearer {text}"}, timeout=20)
    assert (answer.status_code, answer.text) == (401, "Jwks remote fetch is failed")
    assert "the keys of https://issuer" in caplog.text and "jwt_authn_access_denied" in caplog.text
    assert text.split(".")[2] not in caplog.text


def test_two_rules_take_either_token_and_refuse_one_that_neither_takes() -> None:
    """Istio's combination: any that is valid, or none at all."""
    other = RSAKey.generate_key(2048, {"kid": "two"}, auto_kid=False)
    second = json.dumps({"keys": [other.as_dict(private=False)]})
    given = rules(f"jwks: '{JWKS}'}}, {{issuer: 'https://second', jwks: '{second}'")
    head, said = {"alg": "RS256", "kid": "two"}, {"iss": "https://second", "sub": "joe", "exp": int(time.time()) + 600}
    mixed = jwt.encode(head, {**said, "iss": "https://issuer"}, other)
    with EDGES[0](given) as at, httpx.Client(timeout=20) as client:
        for text, status in ((token(), 200), (jwt.encode(head, said, other), 200), (mixed, 401), ("", 200)):
            headers = {"authorization": f"Bearer {text}"} if text else {}
            assert client.get(f"{at}/", headers=headers).status_code == status


def test_a_preflight_needs_no_token() -> None:
    """Browsers send none with it."""
    preflight = {"origin": "https://a", "access-control-request-method": "GET", "authorization": "Bearer bad"}
    with EDGES[0](rules(f"jwks: '{JWKS}'")) as at:
        assert httpx.options(f"{at}/", headers=preflight, timeout=20).status_code == 200
        assert httpx.options(f"{at}/", headers={"authorization": "Bearer bad"}, timeout=20).status_code == 401
