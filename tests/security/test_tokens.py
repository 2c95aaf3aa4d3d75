"""Which tokens are taken? Real keys, real signatures; and every forgery is refused."""

from __future__ import annotations

import hmac
import json
from base64 import urlsafe_b64encode
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from meshlib.model import UNKNOWN_PEER, Access, Headers, Inbound, JwtProvider, Request
from meshlib.policy.admission import Allow, Deny, Verdict
from meshlib.policy.guard import Guard

NOW = 1_000_000.0
KEY, STRANGER = (RSAKey.generate_key(2048, {"kid": "one"}, auto_kid=False) for _ in range(2))
GOOD: dict[str, Any] = {"iss": "https://issuer", "sub": "jane", "aud": "us", "exp": NOW + 600, "scope": "a b"}
JWKS = json.dumps({"keys": [KEY.as_dict(private=False)]})
PROVIDER = JwtProvider("origins-0", "https://issuer", ("us",), JWKS, claim_headers=(("x-sub", "sub"),))


def token(claims: dict[str, Any], key: Any = KEY, **header: Any) -> str:
    return jwt.encode({"alg": "RS256", "kid": "one", **header}, claims, key, algorithms=["RS256"])


def verdict(text: str | None, provider: JwtProvider = PROVIDER) -> Verdict:
    raw = [] if text is None else [(b"authorization", b"Bearer " + text.encode())]
    guard = Guard([Inbound("inbound", access=Access(jwt=(provider,)))])
    return guard.admit(Request("GET", "http", "reviews", "/", Headers(raw)), UNKNOWN_PEER, NOW)


def test_a_good_token_names_its_bearer_and_is_taken_away() -> None:
    """Principal, claims, lists in one text, the header from a claim."""
    found = verdict(token(GOOD))
    assert isinstance(found, Allow)
    assert found.principal == "https://issuer/jane"
    assert found.claims is not None and found.claims["scope"] == ["a", "b"]
    assert found.remove == {b"authorization", b"x-sub"} and found.add == ((b"x-sub", b"jane"),)


def test_no_token_passes_without_a_principal() -> None:
    """RequestAuthentication alone asks for none; a header that only a token may set is taken away."""
    found = verdict(None)
    assert isinstance(found, Allow) and found.principal == "" and found.remove == {b"x-sub"}


def _with_public_key_as_secret(claims: dict[str, Any]) -> str:
    signed = ".".join(_part(each) for each in ({"alg": "HS256", "kid": "one"}, claims))
    mac = hmac.new(KEY.as_pem(private=False), signed.encode(), "sha256").digest()
    return f"{signed}.{urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def _part(value: dict[str, Any]) -> str:
    return urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _none(claims: dict[str, Any]) -> str:
    return ".".join(_part(each) for each in ({"alg": "none"}, claims)) + "."


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        (token(GOOD, STRANGER), 401, "Jwt verification fails"),
        (token(GOOD)[:-6] + "AAAAAA", 401, "Jwt verification fails"),
        (_none(GOOD), 401, "Jwt header [alg] is not supported"),
        (
            _with_public_key_as_secret(GOOD),
            401,
            "Jwt header [alg] is not supported",
        ),
        (token({**GOOD, "exp": NOW - 61}), 401, "Jwt is expired"),
        (token({**GOOD, "nbf": NOW + 61}), 401, "Jwt not yet valid"),
        (token({**GOOD, "iss": "https://other"}), 401, "Jwt issuer is not configured"),
        (token({**GOOD, "aud": "them"}), 403, "Audiences in Jwt are not allowed"),
        (token(GOOD, kid="../../dev/null"), 401, "Jwks doesn't have key to match kid or alg from Jwt"),
        ("a.b", 401, "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        ("a" * 20_000, 401, "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
    ],
)
def test_a_forged_token_is_refused(text: str, status: int, reason: str) -> None:
    """Each with Envoy's words, and nothing of the token in the answer."""
    found = verdict(text)
    assert isinstance(found, Deny)
    assert (found.status, found.body) == (status, reason.encode())


def test_a_clock_may_be_a_minute_off() -> None:
    """Envoy's skew."""
    assert isinstance(verdict(token({**GOOD, "exp": NOW - 59})), Allow)


def test_without_keys_every_token_is_refused() -> None:
    """JWKS down: denied, not let through."""
    found = verdict(token(GOOD), JwtProvider("origins-0", "https://issuer", ("us",), jwks_uri="http://nowhere/"))
    assert isinstance(found, Deny) and found.body == b"Jwks remote fetch is failed"
