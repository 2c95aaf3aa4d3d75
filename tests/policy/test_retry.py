"""Which outcome is tried once more, and after which pause."""

from __future__ import annotations

import random

import pytest
from flows import failed, request, responded

from meshlib.model import HeaderMatch, Outcome, RetryPolicy, StringMatch
from meshlib.policy.retry import CONDITIONS, Retrying, asked_for

UNANSWERED = {"connect-failure", "refused-stream", "reset-before-request", "reset", "timeout"}
NOW = 1_000_000_000.0
"""2001-09-09 01:46:40 GMT."""


def once_more(policy: RetryPolicy, outcome: Outcome, method: str = "GET", resend: bool = False) -> bool:
    retrying = Retrying(policy, random.Random(1))
    return retrying.again(retrying.begin(), outcome, method, resend) is not None


def pause_after(outcome: Outcome, seed: int) -> float | None:
    retrying = Retrying(RetryPolicy(on=frozenset({"5xx"})), random.Random(seed), lambda: NOW)
    return retrying.again(retrying.begin(), outcome, "GET", False)


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


@pytest.mark.parametrize("on", sorted(CONDITIONS))
def test_a_good_answer_is_retried_by_no_condition(on: str) -> None:
    """Not even by one that reads headers."""
    policy = RetryPolicy(
        on=frozenset({on}),
        status_codes=frozenset({503}),
        retriable_headers=(HeaderMatch("x-again", StringMatch("exact", "yes")),),
    )
    assert not once_more(policy, responded(200, {"grpc-status": "0", "x-again": "no"}))


@pytest.mark.parametrize(
    ("name", "code"),
    [("cancelled", 1), ("deadline-exceeded", 4), ("resource-exhausted", 8), ("internal", 13), ("unavailable", 14)],
)
def test_each_grpc_condition_names_one_code(name: str, code: int) -> None:
    """Of the 17 codes in a head without a message, one; an HTTP status says nothing about a gRPC call."""
    policy = RetryPolicy(on=frozenset({name}))
    retried = [n for n in range(17) if once_more(policy, responded(200, {"grpc-status": str(n)}))]
    assert retried == [code]
    assert not once_more(policy, responded(503))


@pytest.mark.parametrize(
    ("on", "failures"),
    [
        ("5xx", UNANSWERED),
        ("gateway-error", UNANSWERED),
        ("reset", UNANSWERED),
        ("connect-failure", {"connect-failure"}),
        ("refused-stream", {"refused-stream"}),
        ("reset-before-request", {"connect-failure", "reset-before-request"}),
        ("retriable-4xx", set()),
        ("retriable-status-codes", set()),
        ("retriable-headers", set()),
        ("envoy-ratelimited", set()),
        ("unavailable", set()),
    ],
)
def test_each_condition_names_the_failures_that_envoy_does(on: str, failures: set[str]) -> None:
    """Envoy's wouldRetryFromReset, row by row; what the application or its library decided is retried by none."""
    policy = RetryPolicy(on=frozenset({on}), status_codes=frozenset({503}))
    assert {each for each in (*UNANSWERED, "client-timeout", "local") if once_more(policy, failed(each))} == failures


def test_retriable_headers_are_conditions_on_the_response() -> None:
    """Any of them suffices; without the condition they mean nothing."""
    headers = (HeaderMatch("x-again", StringMatch("exact", "yes")), HeaderMatch("x-busy", StringMatch("present")))
    policy = RetryPolicy(on=frozenset({"retriable-headers"}), retriable_headers=headers)
    assert once_more(policy, responded(200, {"x-again": "yes"}))
    assert once_more(policy, responded(404, {"x-busy": ""}))
    assert not once_more(policy, responded(200, {"x-again": "no"}))
    assert not once_more(RetryPolicy(retriable_headers=headers), responded(200, {"x-again": "yes"}))


def test_a_rate_limits_answer_is_retried_by_its_own_condition_alone() -> None:
    """Envoy: whatever else its status would mean, x-envoy-ratelimited has the last word."""
    limited = responded(503, {"x-envoy-ratelimited": "true"})
    assert not once_more(RetryPolicy(on=frozenset({"5xx"})), limited)
    assert once_more(RetryPolicy(on=frozenset({"envoy-ratelimited"})), limited)
    assert once_more(RetryPolicy(on=frozenset({"envoy-ratelimited"})), responded(429, {"x-envoy-ratelimited": "true"}))
    assert not once_more(RetryPolicy(on=frozenset({"envoy-ratelimited"})), responded(429))


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "Sun, 09 Sep 2001 01:46:44 GMT"}, 4.0),
        ({"x-ratelimit-reset": "1000000002"}, 2.0),
        ({"x-ratelimit-reset": "7"}, 7.0),
        ({"retry-after": "3", "x-ratelimit-reset": "7"}, 3.0),
        ({"retry-after": "301", "x-ratelimit-reset": "7"}, 7.0),
    ],
)
def test_a_server_that_says_when_is_not_asked_before(headers: dict[str, str], least: float) -> None:
    """The first header that says so; up to half as long again, so that not everybody comes at once (Envoy)."""
    for seed in range(20):
        pause = pause_after(responded(503, headers), seed)
        assert pause is not None
        assert least <= pause < 1.5 * least


@pytest.mark.parametrize(
    "headers",
    [
        {"retry-after": "soon"},
        {"retry-after": "-1"},
        {"retry-after": "Thu, 99 Foo 2001"},
        {"retry-after": "Sun, 09 Sep 2001 01:46:00 GMT"},
        {"x-ratelimit-reset": "999999999.5"},
        {"retry-after": "301"},
        {"retry-after": "9" * 400},
    ],
)
def test_what_makes_no_sense_leaves_the_back_off_as_it_was(headers: dict[str, str]) -> None:
    """Nonsense, the past, and longer than max_reset; a peer's header never raises."""
    pause = pause_after(responded(503, headers), 1)
    assert pause is not None
    assert pause <= 0.025


def test_a_grpc_server_says_when_and_whether() -> None:
    """gRFC A6: an exact delay, after which the back-off begins anew; negative or unreadable is "not again"."""
    policy = RetryPolicy(attempts=9, on=frozenset({"unavailable"}), base_interval=1.0, max_interval=100.0)
    retrying = Retrying(policy, random.Random(1))
    tries = retrying.begin()
    gone = responded(200, {"grpc-status": "14"})
    for _ in range(5):
        assert retrying.again(tries, gone, "GET", False) is not None
    told = responded(200, {"grpc-status": "14", "grpc-retry-pushback-ms": "1500"})
    assert retrying.again(tries, told, "GET", False) == 1.5
    after = retrying.again(tries, gone, "GET", False)
    assert after is not None
    assert after <= 1.0
    for word in ("-1", "never", ""):
        no = responded(200, {"grpc-status": "14", "grpc-retry-pushback-ms": word})
        assert retrying.again(retrying.begin(), no, "GET", False) is None


def test_a_policy_may_allow_to_resend_whatever_the_method() -> None:
    """resend_unsafe is the configuration's word; a body that is gone is gone nevertheless."""
    policy = RetryPolicy(on=frozenset({"5xx"}), resend_unsafe=True)
    assert once_more(policy, responded(503), "POST")
    assert not once_more(policy, responded(503, replayable=False), "POST")


@pytest.mark.parametrize(
    ("headers", "configured", "outcome", "again"),
    [
        ({}, None, 503, False),
        ({"x-envoy-retry-on": "5xx"}, None, 503, True),
        ({"x-envoy-retry-on": "nonsense, 5xx"}, None, 503, True),
        ({"x-envoy-retry-on": "nonsense"}, None, 503, False),
        ({"x-envoy-retry-on": "gateway-error"}, None, 500, False),
        ({"x-envoy-retry-on": "retriable-status-codes", "x-envoy-retriable-status-codes": "404, x"}, None, 404, True),
        ({"x-envoy-max-retries": "3"}, None, 503, False),
        ({"x-envoy-max-retries": "0"}, "5xx", 503, False),
        ({"x-envoy-max-retries": "many"}, "5xx", 503, True),
        ({"x-envoy-retry-on": "retriable-4xx"}, "5xx", 503, True),
        ({"x-envoy-retry-on": "retriable-4xx"}, "5xx", 409, True),
    ],
)
def test_a_request_may_ask_for_retries_itself(
    headers: dict[str, str], configured: str | None, outcome: int, again: bool
) -> None:
    """x-envoy-retry-on adds conditions, x-envoy-max-retries replaces the number, what is unknown means nothing."""
    rng = random.Random(1)
    of_route = None if configured is None else Retrying(RetryPolicy(on=frozenset({configured})), rng)
    retrying = asked_for(request(headers=headers).headers, of_route, rng)
    assert (retrying is not None and retrying.is_retriable(responded(outcome))) is again


def test_the_number_of_retries_that_a_request_asks_for_is_the_number_it_gets() -> None:
    """One without a number (Envoy's default), else what it says."""
    rng = random.Random(1)
    once = asked_for(request(headers={"x-envoy-retry-on": "5xx"}).headers, None, rng)
    more = asked_for(request(headers={"x-envoy-retry-on": "5xx", "x-envoy-max-retries": "7"}).headers, once, rng)
    assert once is not None
    assert more is not None
    assert (once.policy.attempts, more.policy.attempts) == (1, 7)
