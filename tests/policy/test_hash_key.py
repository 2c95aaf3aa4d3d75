"""A request's key is made as Envoy makes it."""

from __future__ import annotations

import random

import xxhash
from flows import request

from meshlib.model import HashPolicy
from meshlib.policy.hash_key import HashKey, hash_key

RNG = random.Random(1)
USER = HashPolicy("header", "end-user")


def of(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())


def test_each_kind_finds_its_value() -> None:
    """Header, query parameter, cookie and the caller's address."""
    asked = request("http://h/p?a=1&b=2", headers={"end-user": "jason", "cookie": 'x=1; who="me"'})
    for policy, value in (
        (USER, "jason"),
        (HashPolicy("query", "b"), "2"),
        (HashPolicy("cookie", "who"), "me"),
        (HashPolicy("source"), "10.1.2.3"),
        (HashPolicy("header", ":authority"), "h"),
    ):
        assert hash_key([policy], asked, "10.1.2.3", RNG) == HashKey(of(value))


def test_what_is_missing_gives_no_key() -> None:
    """Such a call goes anywhere."""
    policies = [USER, HashPolicy("query", "b"), HashPolicy("cookie", "who"), HashPolicy("source")]
    assert hash_key(policies, request("http://h/"), "", RNG) == HashKey(None)
    assert hash_key([], request("http://h/", headers={"end-user": "jason"}), "", RNG) == HashKey(None)


def test_several_are_combined_in_order() -> None:
    """rotl(hash, 1) ^ next (Envoy, HashPolicyImpl::generateHash)."""
    asked = request("http://h/?a=1", headers={"end-user": "jason"})
    first, second = of("jason"), of("1")
    rotated = ((first << 1) | (first >> 63)) & ((1 << 64) - 1)
    assert hash_key([USER, HashPolicy("query", "a")], asked, "", RNG).value == rotated ^ second


def test_a_terminal_policy_ends_the_search_when_it_found_something() -> None:
    """And only then."""
    policies = [HashPolicy("header", "end-user", terminal=True), HashPolicy("query", "a")]
    assert hash_key(policies, request("http://h/?a=1", headers={"end-user": "j"}), "", RNG).value == of("j")
    assert hash_key(policies, request("http://h/?a=1"), "", RNG).value == of("1")


def test_a_missing_cookie_is_made_when_it_has_a_lifetime() -> None:
    """Its value is the key of this call and, sent back, of those after it."""
    policy = HashPolicy("cookie", "session", ttl=3600.0, path="/shop")
    made = hash_key([policy], request("http://h/"), "", random.Random(5))
    assert made.set_cookie.startswith('session="')
    assert made.set_cookie.endswith("; Max-Age=3600; Path=/shop; HttpOnly")
    value = made.set_cookie.split('"')[1]
    again = hash_key([policy], request("http://h/", headers={"cookie": f'session="{value}"'}), "", RNG)
    assert again == HashKey(made.value)
    session = hash_key([HashPolicy("cookie", "s", ttl=0.0)], request("http://h/"), "", RNG)
    assert "Max-Age" not in session.set_cookie
