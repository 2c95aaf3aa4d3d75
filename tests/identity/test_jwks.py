"""Are an issuer's keys there when they are needed? A real HTTP server that rotates, breaks, floods and stalls."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from joserfc.jwk import RSAKey

from meshlib.identity.jwks import EARLY, FIRST_PAUSE, REFRESH
from meshlib.inbound.authorize import AuthorizationEdge
from meshlib.model import JwtProvider
from meshlib.policy.admission import FetchKeys
from meshlib.policy.jwt import Keys
from peers import Answer, Peer, Received
from snapshots import Clock

ONE, TWO = (RSAKey.generate_key(2048, {"kid": kid}, auto_kid=False) for kid in ("one", "two"))


def key_set(*keys: RSAKey) -> bytes:
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


class Issuer:
    """Serves what a test puts in `answer`."""

    def __init__(self) -> None:
        self.answer: Callable[[Received], Answer] = lambda _: Answer(body=key_set(ONE))
        self.peer = Peer(lambda received: self.answer(received))
        self.clock = Clock()
        self.edge = AuthorizationEdge(httpx.HTTPTransport, lambda _: pytest.fail("no gRPC here"), self.clock)

    def provider(self, **fields: Any) -> JwtProvider:
        at = f"http://127.0.0.1:{self.peer.port}"
        return JwtProvider("p", at, **{"jwks_uri": f"{at}/keys", "timeout": 10.0, **fields})

    def ask(self, unknown: str = "", **fields: Any) -> Keys | None:
        """As a request with a token does, waiting where it would."""
        found: Keys | None = self.edge.answer(FetchKeys(self.provider(**fields), unknown))
        return found

    def has_settled(self) -> None:
        """A fetch in the background is over."""
        for thread in threading.enumerate():
            if thread.name == "meshlib-jwks":
                thread.join(20)
                assert not thread.is_alive()


@pytest.fixture
def issuer() -> Any:
    made = Issuer()
    with made.peer:
        yield made
        made.has_settled()
        if made.edge._made is not None:
            made.edge._made.close()


def kids(keys: Keys | None) -> set[str]:
    return set() if keys is None else {each[0] for each in keys._keys}


def test_a_crowd_fetches_once_and_nobody_waits_after_that(issuer: Issuer) -> None:
    """Sixteen first requests are one fetch; what is due is fetched while the known keys are used."""
    with ThreadPoolExecutor(16) as pool:
        assert all(kids(found) == {"one"} for found in pool.map(lambda _: issuer.ask(), range(16)))
    assert len(issuer.peer.received) == 1
    release = threading.Event()

    def slow(_: Received) -> Any:
        async def answer() -> Answer:
            await asyncio.to_thread(release.wait, 20)
            return Answer(body=key_set(TWO))

        return answer()

    issuer.answer = slow
    issuer.clock.now += REFRESH
    assert kids(issuer.ask()) == {"one"}  # at once, though the server has not answered
    assert kids(issuer.edge.ready(FetchKeys(issuer.provider()))) == {"one"}
    release.set()
    issuer.has_settled()
    assert kids(issuer.ask()) == {"two"}


def test_a_rotation_is_seen_with_the_first_token_by_a_new_key(issuer: Issuer) -> None:
    """And the old key is no longer one. Tokens with made-up key ids ask the issuer once in ten seconds at most."""
    assert kids(issuer.ask()) == {"one"}
    issuer.answer = lambda _: Answer(body=key_set(TWO))
    issuer.clock.now += EARLY
    assert kids(issuer.ask("two")) == {"two"}
    for number in range(20):
        assert kids(issuer.ask(f"made up {number}")) == {"two"}
    assert len(issuer.peer.received) == 2
    issuer.clock.now += EARLY
    issuer.ask("made up")
    issuer.has_settled()
    assert len(issuer.peer.received) == 3


def test_keys_outlive_their_issuer(issuer: Issuer) -> None:
    """Down after the first fetch: the last good set stays, and is renewed once the issuer is back."""
    assert kids(issuer.ask()) == {"one"}
    issuer.answer = lambda _: Answer(503)
    issuer.clock.now += REFRESH
    issuer.ask()
    issuer.has_settled()
    assert kids(issuer.ask()) == {"one"}
    issuer.answer = lambda _: Answer(body=key_set(ONE, TWO))
    issuer.clock.now += FIRST_PAUSE
    issuer.ask()
    issuer.has_settled()
    assert kids(issuer.ask()) == {"one", "two"}


BROKEN: dict[str, Callable[[Received], Answer]] = {
    "503": lambda _: Answer(503),
    "no answer": lambda _: Answer(drop=True),
    "no JSON": lambda _: Answer(body=b"<html>"),
    "no keys": lambda _: Answer(body=b'{"keys": []}'),
    "secret keys only": lambda _: Answer(body=b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "one"}]}'),
    "deep": lambda _: Answer(body=b"[" * 100_000),
    "huge": lambda _: Answer(chunks=(b" " * 65536 for _ in range(64))),
    "a redirect": lambda _: Answer(302, headers=[("location", "http://127.0.0.1/keys")]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_without_keys_there_are_none_and_recovery_needs_no_restart(issuer: Issuer, name: str) -> None:
    """Whatever is wrong with the answer; a flood is cut off at a mebibyte."""
    issuer.answer = BROKEN[name]
    assert issuer.ask() is None
    assert issuer.ask() is None
    assert len(issuer.peer.received) == 1  # what is down is not asked by every request
    issuer.answer = lambda _: Answer(body=key_set(ONE))
    issuer.clock.now += FIRST_PAUSE
    issuer.ask()
    issuer.has_settled()
    assert kids(issuer.ask()) == {"one"}


def test_a_server_that_stalls_or_trickles_holds_up_nobody_for_long(issuer: Issuer) -> None:
    """The first token waits for as long as its rule says, the next ones don't; a byte now and then is none."""
    issuer.answer = lambda _: Answer(raw=b"HTTP/1.1 200 OK\r\n", stall=True)
    assert issuer.ask(timeout=0.3) is None
    issuer.has_settled()
    issuer.clock.now += FIRST_PAUSE
    begin = threading.Event()

    async def trickle() -> AsyncIterator[bytes]:
        begin.set()
        for _ in range(200):
            yield b" "
            await asyncio.sleep(0.05)

    issuer.answer = lambda _: Answer(chunks=trickle())
    assert issuer.ask(timeout=0.3) is None
    assert begin.wait(20)
    issuer.has_settled()
    assert issuer.ask(timeout=0.3) is None


def test_an_issuer_says_where_its_keys_are(issuer: Issuer) -> None:
    """jwksUri left out: OpenID Connect's discovery, as Istio does it."""

    def answer(received: Received) -> Answer:
        if received.target == "/.well-known/openid-configuration":
            return Answer(body=json.dumps({"jwks_uri": f"http://127.0.0.1:{issuer.peer.port}/elsewhere"}).encode())
        return Answer(body=key_set(TWO))

    issuer.answer = answer
    assert kids(issuer.ask(jwks_uri="")) == {"two"}
    assert [each.target for each in issuer.peer.received] == ["/.well-known/openid-configuration", "/elsewhere"]


@pytest.mark.parametrize("told", [b"[]", b"{}", b'{"jwks_uri": 7}', b'{"jwks_uri": "file:///etc/passwd"}'])
def test_an_issuer_that_names_no_place_has_no_keys(issuer: Issuer, told: bytes) -> None:
    """Nor one that names a file of ours."""
    issuer.answer = lambda _: Answer(body=told)
    assert issuer.ask(jwks_uri="") is None
