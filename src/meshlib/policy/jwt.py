"""Is this token one that the provider made, for us, and still good? Finds tokens in a request and verifies them.

Only signatures by a private key are taken (RS, PS, ES, EdDSA): `none` is no signature, and an HS token "signed" with
the public key is what an attacker can make. The key's own type has to fit the token's algorithm. Envoy's texts.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from meshlib.model import JwtProvider, Request

SKEW = 60.0
"""Seconds by which clocks may differ (Envoy clock_skew_seconds)."""
MAX_TOKEN = 16 * 1024
"""Characters. Real tokens are below 8 KiB; servers take about as much in one header."""
MAX_KEYS, MAX_TRIED = 100, 5
_ALGORITHMS = {
    **{f"{kind}{bits}": "RSA" for kind in ("RS", "PS") for bits in (256, 384, 512)},
    **{f"ES{bits}": "EC" for bits in (256, 384, 512)},
    "EdDSA": "OKP",
    "Ed25519": "OKP",
}
_SIGNING_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519", "Ed25519": "Ed25519"}
_LISTS = ("scope", "permission")
"""Claims that are lists in one text without being told (Envoy's jwt_authn normalises these two)."""

MISSING = "Jwt is missing"
BAD_FORMAT = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
BAD_HEADER = "Jwt header is an invalid JSON"
BAD_ALGORITHM = "Jwt header [alg] is not supported"
BAD_PAYLOAD = "Jwt payload is an invalid JSON"
BAD_SIGNATURE = "Jwt verification fails"
UNKNOWN_ISSUER = "Jwt issuer is not configured"
EXPIRED, TOO_EARLY = "Jwt is expired", "Jwt not yet valid"
BAD_AUDIENCE = "Audiences in Jwt are not allowed"
NO_KEY = "Jwks doesn't have key to match kid or alg from Jwt"
NO_KEYS = "Jwks remote fetch is failed"


class Refused(Exception):
    """reason: one of the texts above. It holds nothing of the token."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Found(NamedTuple):
    """A token in a request. header, param: where it stood; "" where not there."""

    token: str
    header: str = ""
    param: str = ""


class Token(NamedTuple):
    """A token that is taken apart, and not verified yet."""

    text: str
    algorithm: str
    key_id: str
    payload: Mapping[str, Any]


class Keys:
    """A JSON Web Key Set, checked once. Keys that can't verify a signature are left out."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[tuple[str, str, str, Any]]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def read(cls, text: str) -> Keys:
        """Raises ValueError for what is no key set."""
        from joserfc.errors import JoseError
        from joserfc.jwk import JWKRegistry

        given = json.loads(text)
        listed = given.get("keys") if isinstance(given, dict) else None
        if not isinstance(listed, list):
            raise ValueError("a key set has a list of `keys`")
        found: list[tuple[str, str, str, Any]] = []
        for each in listed[:MAX_KEYS]:
            if not isinstance(each, dict) or each.get("use", "sig") != "sig" or each.get("kty") == "oct":
                continue
            public = {name: value for name, value in each.items() if name not in ("d", "p", "q", "dp", "dq", "qi")}
            try:
                key = JWKRegistry.import_key({name: v for name, v in public.items() if name not in ("key_ops", "alg")})
            except (JoseError, ValueError, TypeError, KeyError):
                continue
            found.append((str(each.get("kid") or ""), str(each.get("kty")), str(each.get("alg") or ""), key))
        if not found:
            raise ValueError("a key set with no key that verifies signatures")
        return cls(found)

    def fitting(self, algorithm: str, key_id: str) -> list[Any]:
        """With the token's key id, or, where it names none, every one of the algorithm's type. A key without an id
        fits any (Envoy)."""
        wanted, curve = _ALGORITHMS[algorithm], _SIGNING_CURVES.get(algorithm)
        return [
            key
            for kid, kind, made_for, key in self._keys
            if kind == wanted
            and made_for in ("", algorithm)
            and (not key_id or kid in ("", key_id))
            and (curve is None or getattr(key, "curve_name", curve) == curve)
        ][:MAX_TRIED]

    def __repr__(self) -> str:
        return f"<Keys {len(self._keys)}>"


def find(provider: JwtProvider, request: Request) -> Iterator[Found]:
    """The tokens that stand where this provider's may stand."""
    headers, has_places = provider.from_headers, False
    if headers or provider.from_params or provider.from_cookies:
        has_places = True
    else:
        headers = (("authorization", "Bearer "),)
    for name, prefix in headers:
        value = request.headers.get(name)
        if value is not None and value[: len(prefix)].lower() == prefix.lower():
            text = value[len(prefix) :].strip()
            if not prefix or text:
                yield Found(text, header=name)
    params = provider.from_params if has_places else ("access_token",)
    query = request.path.partition("?")[2]
    if params and query:
        for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=None):
            if name in params:
                yield Found(value, param=name)
    if provider.from_cookies and (cookies := request.headers.get("cookie")):
        try:
            jar = SimpleCookie(cookies)
        except CookieError:
            return
        for name in provider.from_cookies:
            if name in jar:
                yield Found(jar[name].value)


def read(text: str) -> Token:
    """Take a token apart. Raises Refused."""
    parts = text.split(".")
    if len(text) > MAX_TOKEN or len(parts) != 3 or not all(parts[:2]):
        raise Refused(BAD_FORMAT)
    header = _json(parts[0], BAD_HEADER)
    algorithm, key_id = header.get("alg"), header.get("kid", "")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise Refused(BAD_ALGORITHM)
    # RFC 7515, 4.1.11: what is critical and not understood makes a token invalid.
    if not isinstance(key_id, str) or "crit" in header or "b64" in header:
        raise Refused(BAD_HEADER)
    return Token(text, algorithm, key_id, _json(parts[1], BAD_PAYLOAD))


def check(token: Token, provider: JwtProvider, now: float) -> None:
    """Everything but the signature; `now` in seconds since 1970. Raises Refused."""
    payload = token.payload
    if payload.get("iss") != provider.issuer:
        raise Refused(UNKNOWN_ISSUER)
    for name, reason in (("nbf", TOO_EARLY), ("exp", EXPIRED)):
        moment = payload.get(name)
        if moment is None:
            continue
        if isinstance(moment, bool) or not isinstance(moment, int | float):
            raise Refused(BAD_PAYLOAD)
        if moment > now + SKEW if name == "nbf" else moment < now - SKEW:
            raise Refused(reason)
    if provider.audiences:
        given = payload.get("aud")
        audiences = given if isinstance(given, list) else [given]
        wanted = {_audience(each) for each in provider.audiences}
        if not any(isinstance(each, str) and _audience(each) in wanted for each in audiences):
            raise Refused(BAD_AUDIENCE)


def verify(token: Token, keys: Sequence[Any]) -> None:
    """Raises Refused unless one of these keys has signed it."""
    from joserfc import jws
    from joserfc.errors import JoseError

    for key in keys:
        try:
            jws.deserialize_compact(token.text.encode("ascii"), key, algorithms=[token.algorithm])
            return
        except (JoseError, ValueError, TypeError):
            continue
    raise Refused(BAD_SIGNATURE)


def claims(token: Token, provider: JwtProvider) -> dict[str, Any]:
    """The payload, with texts that are lists as lists."""
    found = dict(token.payload)
    for name in (*_LISTS, *provider.space_delimited):
        if isinstance(found.get(name), str):
            found[name] = found[name].split(" ")
    return found


def principal(payload: Mapping[str, Any]) -> str:
    issuer, subject = payload.get("iss"), payload.get("sub")
    return f"{issuer}/{subject}" if isinstance(issuer, str) and isinstance(subject, str) else ""


def _audience(text: str) -> str:
    """Envoy compares without the scheme and a slash at the end (jwt_verify_lib)."""
    for scheme in ("https://", "http://"):
        text = text.removeprefix(scheme)
    return text.rstrip("/")


def _json(part: str, reason: str) -> dict[str, Any]:
    try:
        found = json.loads(_decoded(part))
    except (ValueError, RecursionError):
        raise Refused(reason) from None
    if not isinstance(found, dict):
        raise Refused(reason)
    return found


def _decoded(part: str) -> bytes:
    if not part.isascii() or not part.replace("-", "").replace("_", "").isalnum():
        raise ValueError("no base64url")
    return urlsafe_b64decode(part + "=" * (-len(part) % 4))
