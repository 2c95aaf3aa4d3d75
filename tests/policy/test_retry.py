"""Which outcome is tried once more, and after which pause."""

from __future__ import annotations

import random

import pytest
from flows import failed, responded

from meshlib.model import Outcome, RetryPolicy
from meshlib.policy.retry import Retrying


def once_more(policy: RetryPolicy, outcome: Outcome, method: str = "GET", resend: bool = False) -> bool:
    retrying = Retrying(policy, random.Random(1))
    return retrying.again(retrying.begin(), outcome, method, resend) is not None


@pytest.mark.parametrize(
    ("on", "outcome", "expected"),
    [
        ("5xx", responded(500), True),
        ("5xx", responded(499), False),
        ("5xx", failed("reset"), True),
        ("5xx", failed("timeout"), True),
        ("gateway-error", responded(503), True),
        ("gateway-error", responded(500), False),
        ("connect-failure", failed("connect-failure"), True),
        ("connect-failure", failed("reset"), False),
        ("reset-before-request", failed("reset-before-request"), True),
        ("reset-before-request", failed("reset"), False),
        ("reset", failed("reset"), True),
        ("retriable-4xx", responded(409), True),
        ("retriable-4xx", responded(404), False),
        ("unavailable", responded(200, {"grpc-status": "14"}), True),
        ("unavailable", responded(200, {"grpc-status": "0"}), False),
        ("5xx", failed("client-timeout"), False),
        ("5xx", failed("local"), False),
    ],
)
def test_each_condition_retries_what_envoy_says(on: str, outcome: Outcome, expected: bool) -> None:
    """One row a condition and a near miss."""
    assert once_more(RetryPolicy(on=frozenset({on})), outcome) is expected


def test_status_codes_are_conditions() -> None:
    """`retryOn: 429` in YAML."""
    assert once_more(RetryPolicy(status_codes=frozenset({429})), responded(429))
    assert not once_more(RetryPolicy(status_codes=frozenset({429})), responded(503))


def test_what_may_have_been_carried_out_is_not_sent_twice() -> None:
    """A POST is resent only if no byte can have reached the server, or its sender vouches for it."""
    policy = RetryPolicy(on=frozenset({"5xx"}) | RetryPolicy().on)
    assert not once_more(policy, responded(503), "POST")
    assert not once_more(policy, failed("reset"), "POST")
    assert once_more(policy, failed("connect-failure"), "POST")
    assert once_more(policy, responded(503), "POST", resend=True)


def test_a_consumed_body_is_never_sent_again() -> None:
    """Not even for GET, not even when vouched for."""
    assert not once_more(RetryPolicy(on=frozenset({"5xx"})), responded(503, replayable=False), "GET", resend=True)


def test_pauses_grow_stay_random_and_are_bounded() -> None:
    """Envoy: up to (2^n - 1) * base, at most max, from zero on."""
    policy = RetryPolicy(attempts=6, on=frozenset({"5xx"}), base_interval=0.1, max_interval=0.9)
    ceilings = [0.1, 0.3, 0.7, 0.9, 0.9, 0.9]
    seen: list[list[float]] = [[] for _ in ceilings]
    for seed in range(300):
        retrying = Retrying(policy, random.Random(seed))
        tries = retrying.begin()
        for pauses in seen:
            pause = retrying.again(tries, responded(503), "GET", False)
            assert pause is not None
            pauses.append(pause)
        assert retrying.again(tries, responded(503), "GET", False) is None
    for pauses, ceiling in zip(seen, ceilings, strict=True):
        assert 0.0 <= min(pauses) < 0.05 * ceiling
        assert 0.95 * ceiling < max(pauses) <= ceiling
