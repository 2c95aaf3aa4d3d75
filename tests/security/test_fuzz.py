"""Can any input confuse who reads certificates, tokens, paths and headers? A corpus first, then Hypothesis.

The corpus (corpus/*.json) holds what was found once, and what was thought of; each input is replayed with every run.
Then each property gets EXAMPLES inputs, the same ones in every run. `MESHLIB_FUZZ=20000 python -m pytest
tests/security/test_fuzz.py` takes so many, and new ones each time.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization as form
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc.jwk import RSAKey

from meshlib.controlplane.authentication import NotAuthenticated, _unverified
from meshlib.controlplane.ca import BadRequest, CertificateAuthority
from meshlib.gateway import headers as gateway_headers
from meshlib.identity.pem import BadCredentials, credentials_of, identity_of
from meshlib.inbound.admit import seen_by_application, without_params
from meshlib.model import UNKNOWN_PEER, Access, Headers, Inbound, JwtProvider, Peer, Request, SpiffeId
from meshlib.policy import jwt, paths
from meshlib.policy.admission import Allow, Deny
from meshlib.policy.guard import Guard, remote_address
from meshlib.policy.propagation import Intake
from security.test_attacks import reaches_admin, rules, token

T = TypeVar("T")
EXAMPLES = int(os.environ.get("MESHLIB_FUZZ", "60"))
CORPUS = Path(__file__).with_name("corpus")
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="MESHLIB_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def corpus(name: str) -> list[str]:
    found: list[str] = json.loads((CORPUS / f"{name}.json").read_text())
    return found


def encoded(name: str) -> list[bytes]:
    return [base64.b64decode(each) for each in corpus(name)]


def damaged(good: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of these, with a few bytes changed, removed or put in."""

    def change(start: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        found = bytearray(start)
        for place, length, given_bytes in edits:
            at = place % (len(found) + 1)
            found[at : at + length] = given_bytes
        return bytes(found)

    edit = st.tuples(st.integers(0, 2000), st.integers(0, 4), st.binary(max_size=4))
    return st.builds(change, st.sampled_from(good), st.lists(edit, max_size=4)) | st.binary(max_size=300)


# Certificates


def pem(der: bytes, kind: str) -> bytes:
    text = base64.encodebytes(der)
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (kind.encode(), text, kind.encode())


def read_certificate(der: bytes) -> None:
    try:
        found = identity_of(x509.load_pem_x509_certificates(pem(der, "CERTIFICATE"))[0])
    except (BadCredentials, ValueError):  # ValueError: no certificate, which credentials_of translates
        pass
    else:
        assert found.uri.encode() in der
        assert SpiffeId.parse(found.uri) == found
    with pytest.raises(BadCredentials):
        credentials_of(pem(der, "CERTIFICATE"), b"no key", pem(der, "CERTIFICATE"))


AUTHORITY = CertificateAuthority("cluster.local")
BANKER = SpiffeId.of("cluster.local", "default", "banker")


def sign_request(der: bytes) -> None:
    try:
        leaf = AUTHORITY.sign(pem(der, "CERTIFICATE REQUEST"), BANKER)[0]
    except BadRequest:
        return
    names = x509.load_pem_x509_certificate(leaf).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [BANKER.uri]


def read_identity(text: str) -> None:
    try:
        found = SpiffeId.parse(text)
    except ValueError:
        return
    assert found.uri == text and text.isascii() and "//" not in text[9:] and not set(text) & set("?#%@\\\n \x00")


# Tokens


KEY = RSAKey.generate_key(2048, {"kid": "one"}, auto_kid=False)
JWKS = json.dumps({"keys": [KEY.as_dict(private=False)]})
GOOD = token(KEY, sub="jane", exp=2_000_000_000)
PROVIDER = JwtProvider(
    "p", "me", ("us",), JWKS, from_headers=(("authorization", "Bearer "),), from_cookies=("session",)
)
TOKENS = Guard([Inbound("inbound", access=Access(jwt=(PROVIDER,)))])


def present(text: str) -> None:
    """Whatever is said in it: a principal only by the signed payload; never an exception, which would deny as 403."""
    raw = [(b"authorization", f"Bearer {text}".encode("utf-8", "replace"))]
    verdict = TOKENS.admit(Request("GET", "http", "a", "/", Headers(raw)), UNKNOWN_PEER, 1_900_000_000.0)
    assert isinstance(verdict, Allow) or verdict.details != "rbac_access_denied", verdict
    if isinstance(verdict, Allow) and verdict.principal:
        assert verdict.claims is not None and text.strip().split(".")[:2] == GOOD.split(".")[:2]
    try:
        _unverified(text)
    except NotAuthenticated:
        pass


def read_keys(text: str) -> None:
    try:
        keys = jwt.Keys.read(text)
    except (ValueError, RecursionError):
        return
    assert keys.fitting("RS256", "") is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


names = st.sampled_from(["alg", "kid", "typ", "crit", "jwk", "jku", "iss", "sub", "aud", "exp", "nbf", "iat", "scope"])
values = json_values | st.sampled_from(["RS256", "none", "HS256", "ES256", "EdDSA", "me", "us", "one", 2_000_000_000])
objects = st.dictionaries(names, values, max_size=6)
made_up = st.builds(
    lambda *them: ".".join(them), objects.map(part), objects.map(part), st.text("AZaz09-_=", max_size=20)
)
almost = damaged([GOOD.encode()]).map(lambda found: found.decode("latin-1"))
key_fields = st.dictionaries(
    st.sampled_from(["kty", "kid", "use", "alg", "n", "e", "crv", "x", "y", "k", "d"]),
    json_values | st.sampled_from(["RSA", "EC", "OKP", "oct", "AQAB", "P-256", "Ed25519", "sig", "RS256"]),
)


# Paths


pieces = st.sampled_from(
    ["/", "//", ".", "..", "/./", "/../", "%2e", "%2E", "%2f", "%2F", "%5c", "\\", "%25", "%252f", ";", "?", "#", "%00",
     "%", "%6", "admin", "adm", "in", "%61dmin", "a%64min", "open", "x", "%20", " ", "\t", "\xff", "%c0%ae", "%c0%af"]
)  # fmt: skip
some_path = st.lists(pieces, max_size=8).map(lambda found: "/" + "".join(found)) | st.text(max_size=30)
DENY = Guard([rules("{action: DENY, rules: [{to: [{operation: {paths: ['/admin*']}}]}]}")])
ALLOW = Guard([rules("{action: ALLOW, rules: [{to: [{operation: {paths: ['/open*']}}]}]}")])


def read_path(path: str) -> None:
    bare = paths.bare(path)
    for how in ("BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"):
        found = paths.normalized(bare, how)
        assert not {".", ".."} & set(found.split("/")[1:]), (how, found)
        assert paths.normalized(found, "BASE").count("/..") <= found.count("/..")
    readings = paths.readings(bare)
    assert not any({".", ".."} & set(each.split("/")[1:]) for each in readings)
    if paths.is_clean(bare):
        assert readings == (bare,)
    request = Request("GET", "http", "a", path, Headers())
    for guard in (DENY, ALLOW):
        verdict = guard.admit(request, UNKNOWN_PEER, 0.0)
        assert isinstance(verdict, Allow) or "failed" not in verdict.reason, verdict
        if path.startswith("/") and reaches_admin(unquote(bare, "latin-1")):
            assert isinstance(verdict, Deny), path


def read_template(text: str) -> None:
    try:
        paths.compile_template(text)
    except ValueError:
        pass


# Headers


header_names = st.sampled_from(
    [b"connection", b"host", b"content-length", b"transfer-encoding", b"te", b"upgrade", b"x-forwarded-for", b"cookie",
     b"x-forwarded-client-cert", b"X-Forwarded-Client-Cert", b"x_forwarded_client_cert", b"x-forwarded-proto",
     b"x-envoy-internal", b"x-request-id", b"x-user", b"x_user", b"X_User", b"traceparent", b"tracestate", b"baggage",
     b"x-envoy-expected-rq-timeout-ms", b"grpc-timeout", b"authorization", b"forwarded", b"expect"]
)  # fmt: skip
header_values = st.binary(max_size=30) | st.sampled_from(
    [b"close", b"x-user, host", b"1.2.3.4", b"::1, 5.6.7.8", b",", b"chunked", b"100-continue", b"session=a.b.c", b"-1",
     b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"Bearer a.b.c", b"1H", b"99999999999999999S"]
)  # fmt: skip
some_headers = st.lists(st.tuples(header_names | st.binary(min_size=1, max_size=12), header_values), max_size=12)
CLAIMED = Allow(frozenset({b"x-user"}), ((b"x-role", b"user"),), remove_params=frozenset({"access_token"}))


def read_headers(raw: list[tuple[bytes, bytes]]) -> None:
    sent = gateway_headers.to_upstream(raw, "10.0.0.9", False, 1, False)
    named = [name.replace(b"_", b"-") for name, _ in sent]
    assert not {b"x-forwarded-client-cert", b"expect", b"connection", b"transfer-encoding", b"upgrade"} & set(named)
    for name in (b"x-forwarded-for", b"x-forwarded-proto", b"x-envoy-external-address", b"x-request-id"):
        assert named.count(name) == 1, name
    seen = seen_by_application(raw, CLAIMED, Peer())
    assert not [name for name, _ in seen if name.lower().replace(b"_", b"-") in (b"x-user", b"x-forwarded-client-cert")]
    carried = Intake(["x-tenant", "cookie", "baggage"]).take_up([(n.lower(), v) for n, v in raw], time.monotonic)
    assert not [value for _, value in carried.headers if b"\r" in value or b"\n" in value]
    request = Request("GET", "http", "a", "/?access_token=x", Headers(raw))
    verdict = TOKENS.admit(request, UNKNOWN_PEER, 1_900_000_000.0)
    assert isinstance(verdict, Allow) or verdict.details != "rbac_access_denied"
    told = request.headers.get("x-forwarded-for")
    for hops in (0, 1, 5):
        ipaddress.ip_address(remote_address("10.0.0.9", told, hops))
    for _, value in raw:
        assert b"access_token" not in [each.partition(b"=")[0] for each in without_params(value, CLAIMED).split(b"&")]


def line(text: str) -> list[tuple[bytes, bytes]]:
    name, _, value = text.partition(": ")
    return [(name.encode("latin-1"), value.encode("latin-1"))]


# What is run


PROPERTIES: dict[str, tuple[Callable[[Any], None], list[Any], st.SearchStrategy[Any]]] = {
    "certificates": (read_certificate, encoded("certificates"), damaged(encoded("certificates")[:1])),
    "certificate requests": (sign_request, encoded("requests"), damaged(encoded("requests")[:1])),
    "SPIFFE IDs": (
        read_identity,
        corpus("identities"),
        st.text("spife:/ab.-_%?#@\\", max_size=30).map("spiffe://".__add__) | st.text(max_size=40),
    ),
    "tokens": (present, corpus("tokens"), made_up | almost | st.text(max_size=60)),
    "key sets": (
        read_keys,
        ["", "null", "[]", '{"keys": 1}', '{"keys": [{}]}', "[" * 5000],
        st.lists(key_fields, max_size=3).map(lambda keys: json.dumps({"keys": keys})) | json_values.map(json.dumps),
    ),
    "paths": (read_path, corpus("paths"), some_path),
    "path templates": (read_template, ["{", "{*}", "/{**}/{*}"], st.text("/a{*}", max_size=12)),
    "headers": (read_headers, [line(each) for each in corpus("headers")], some_headers),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_nothing_confuses_the_reader_of(name: str) -> None:
    """The corpus, then made-up inputs: an error that says so, or a result that holds what it promises."""
    read, known, strategy = PROPERTIES[name]
    for each in known:
        read(each)
    fuzz(given(strategy)(read))()


def test_the_corpus_is_small_and_replayed() -> None:
    """Each file of it belongs to a property, and stays small enough to be read."""
    files = sorted(CORPUS.glob("*.json"))
    assert [each.stem for each in files] == ["certificates", "headers", "identities", "paths", "requests", "tokens"]
    assert sum(each.stat().st_size for each in files) < 32 * 1024
    assert sum(len(json.loads(each.read_text())) for each in files) >= 140


def test_a_good_certificate_and_a_good_token_pass() -> None:
    """Or the properties above would say nothing."""
    der = encoded("certificates")[0]
    found = identity_of(x509.load_der_x509_certificate(der))
    assert found.uri == "spiffe://cluster.local/ns/default/sa/bank"
    assert x509.load_der_x509_certificate(der).public_bytes(form.Encoding.DER) == der
    raw = [(b"authorization", f"Bearer {GOOD}".encode())]
    verdict = TOKENS.admit(Request("GET", "http", "a", "/", Headers(raw)), UNKNOWN_PEER, 1_900_000_000.0)
    assert isinstance(verdict, Allow) and verdict.principal == "me/jane"


def test_the_page_tells_what_is_fuzzed() -> None:
    """docs/security.md has a row for each reader, with as many inputs of the corpus."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    assert [
        row for name, (_, known, _) in PROPERTIES.items() if (row := f"| {name} | 60 | {len(known)} |") not in page
    ] == []
