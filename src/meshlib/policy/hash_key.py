"""Which key does a request have for ring hash and maglev? Envoy's hash policies (source/common/http/hash_policy.cc).

Each policy that finds its value gives an xxHash64 of it; they are combined in order by rotating what there is by one
bit and XORing the next in. A request for which none finds anything has no key, and goes anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from typing import NamedTuple
from urllib.parse import parse_qs

import xxhash

from meshlib.model import HashPolicy, Request

_64_BITS = (1 << 64) - 1


class HashKey(NamedTuple):
    """value: None when nothing was found. set_cookie: the response header that makes the client keep its key, ""
    when none was generated."""

    value: int | None
    set_cookie: str = ""


def hash_key(policies: Sequence[HashPolicy], request: Request, source: str, rng: random.Random) -> HashKey:
    """source: the address of who asks ("" when unknown)."""
    found: int | None = None
    set_cookie = ""
    for policy in policies:
        part: str | None
        if policy.kind == "header":
            part = _header(policy, request)
        elif policy.kind == "query":
            part = next(iter(parse_qs(request.path.partition("?")[2]).get(policy.name, ())), None)
        elif policy.kind == "source":
            part = source or None
        else:
            part = _cookie(request.headers.get("cookie"), policy.name)
            if part is None and policy.ttl is not None:
                part = f"{rng.getrandbits(64):016x}"
                set_cookie = _set_cookie(policy, part)
        if part is not None:
            hashed = xxhash.xxh64_intdigest(part.encode("utf-8", "surrogateescape"))
            found = hashed if found is None else ((found << 1 | found >> 63) & _64_BITS) ^ hashed
        if policy.terminal and found is not None:
            break
    return HashKey(found, set_cookie)


def _header(policy: HashPolicy, request: Request) -> str | None:
    value = request.authority if policy.name == ":authority" else request.headers.get(policy.name)
    # Envoy hashes several values of one name sorted and one after the other; joined they came, so they stay joined.
    return value or None


def _cookie(header: str | None, name: str) -> str | None:
    if not header:
        return None
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return None
    return None if found is None else found.value


def _set_cookie(policy: HashPolicy, value: str) -> str:
    """As Envoy's Http::Utility::makeSetCookieValue: a session's cookie has no Max-Age."""
    age = f"; Max-Age={int(policy.ttl)}" if policy.ttl else ""
    path = f"; Path={policy.path}" if policy.path else ""
    return f'{policy.name}="{value}"{age}{path}; HttpOnly'
