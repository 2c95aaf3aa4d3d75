"""Which keys does an issuer sign with? Key sets fetched in the background and kept; nobody waits but for the first.

A set is renewed every `REFRESH` seconds while it is used. One that can't be renewed stays (the last good), and what is
down is asked again after a pause that doubles. A token with a key id that the set lacks renews it early, at most once
in `EARLY` seconds whatever callers send; only such tokens wait for that. Where a rule names no place for its keys, the
issuer says it (OpenID Connect Discovery 1.0, 4).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable

from meshlib.model import JwtProvider
from meshlib.policy.jwt import Keys
from meshlib.state import forks

_log = logging.getLogger("meshlib.identity")

REFRESH, EARLY = 300.0, 10.0
"""Seconds; Istio renews every 20 minutes, Envoy's cache holds 5."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
DISCOVERY = "/.well-known/openid-configuration"
MAX_BYTES, MAX_SETS = 1024 * 1024, 100

Fetch = Callable[[str, float], str]
"""(URL, timeout in seconds) -> the text. Raises OSError or ValueError."""


class _Set:
    def __init__(self) -> None:
        self.keys: Keys | None = None
        self.due = 0.0
        self.last_try = float("-inf")
        self.pause = FIRST_PAUSE
        self.fetching: threading.Thread | None = None
        self.has_answer = threading.Event()


class JwksCache:
    """Thread-safe. Fetches on a thread of its own for each set, one at a time."""

    def __init__(self, fetch: Fetch, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch, self._clock = fetch, clock
        self._lock = forks.lock()
        self._sets: dict[str, _Set] = {}

    def at_hand(self, provider: JwtProvider, unknown: str = "") -> Keys | None:
        """The keys as they are known; None when the issuer could not be asked. Starts what is due; does not block.

        Raises LookupError when a fetch is under way that is worth waiting for.
        """
        kept = self._started(provider, unknown)
        if kept.has_answer.is_set() or (kept.keys is not None and not unknown):
            return kept.keys
        raise LookupError(_place(provider))

    def wait(self, provider: JwtProvider, unknown: str = "") -> Keys | None:
        """`at_hand`, waiting at most the provider's timeout for a fetch that is under way."""
        kept = self._started(provider, unknown)
        if kept.keys is None or unknown:
            kept.has_answer.wait(provider.timeout)
        return kept.keys

    def _started(self, provider: JwtProvider, unknown: str) -> _Set:
        with self._lock:
            kept = self._sets.get(_place(provider))
            if kept is None:
                if len(self._sets) >= MAX_SETS:
                    del self._sets[next(iter(self._sets))]
                kept = self._sets[_place(provider)] = _Set()
            now = self._clock()
            is_early = bool(unknown) and now - kept.last_try >= EARLY
            if (now >= kept.due or is_early) and kept.fetching is None:
                if is_early or kept.last_try == float("-inf"):  # later, nobody waits for what was down
                    kept.has_answer.clear()
                kept.last_try = now
                kept.fetching = threading.Thread(
                    target=self._renew, args=(provider, kept), name="meshlib-jwks", daemon=True
                )
                kept.fetching.start()
            return kept

    def _renew(self, provider: JwtProvider, kept: _Set) -> None:
        try:
            uri = provider.jwks_uri or self._discovered(provider)
            keys = Keys.read(self._fetch(uri, provider.timeout))
        except Exception as error:
            _log.warning("the keys of %s: %s: %s", provider.issuer, _place(provider), repr(error))
            with self._lock:
                kept.due = self._clock() + kept.pause
                kept.pause = min(kept.pause * 2, LONGEST_PAUSE)
                kept.fetching = None
        else:
            with self._lock:
                kept.keys, kept.pause, kept.fetching = keys, FIRST_PAUSE, None
                kept.due = self._clock() + REFRESH
        kept.has_answer.set()

    def _discovered(self, provider: JwtProvider) -> str:
        found = json.loads(self._fetch(provider.issuer.rstrip("/") + DISCOVERY, provider.timeout))
        uri = found.get("jwks_uri") if isinstance(found, dict) else None
        if not isinstance(uri, str) or not uri.startswith(("https://", "http://")):
            raise ValueError("its configuration names no jwks_uri")
        return uri

    def __repr__(self) -> str:
        return f"<JwksCache {len(self._sets)} sets>"


def _place(provider: JwtProvider) -> str:
    return provider.jwks_uri or provider.issuer
