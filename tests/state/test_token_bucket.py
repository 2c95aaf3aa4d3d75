"""Does a bucket give exactly what it has, whoever asks, and forget no more than it must?"""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.state.token_bucket import Buckets, TokenBucket


def test_it_is_full_at_first_and_fills_steadily() -> None:
    """As a real Envoy does: 3 in 7 s and none left, then one more is there after 2.5 s. Never more than it holds."""
    bucket = TokenBucket(3, 3, 7.0, now=100.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait() == pytest.approx(7 / 3)
    assert [bucket.take(102.5), bucket.take(102.5)] == [True, False]
    assert [bucket.take(500.0) for _ in range(4)] == [True, True, True, False]


def test_a_clock_reading_that_comes_late_neither_adds_nor_takes() -> None:
    """Two threads read the clock in one order and get the lock in the other."""
    bucket = TokenBucket(1, 1, 10.0, now=0.0)
    assert [bucket.take(now) for now in (20.0, 10.0, 25.0, 30.0)] == [True, False, False, True]


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 10**10),
    st.lists(st.integers(0, 5 * 10**9), min_size=1, max_size=200),
)
def test_it_gives_what_exact_sums_say(most: int, per_fill: int, interval: int, pauses: list[int]) -> None:
    """Not one token more or less than in fractions, whatever the pattern of calls. Times in nanoseconds."""
    at, tokens = 0, Fraction(most)
    bucket = TokenBucket(most, per_fill, interval / 10**9, 0.0)
    for pause in pauses:
        at += pause
        tokens = min(Fraction(most), tokens + Fraction(pause * per_fill, interval))
        assert bucket.take(at / 10**9) == (tokens >= 1)
        tokens -= tokens >= 1
        assert bucket.tokens == tokens.numerator // tokens.denominator


def test_each_key_has_a_bucket_of_its_own_up_to_a_bound() -> None:
    """The one that was not asked for longest is forgotten."""
    buckets = Buckets(1, 1, 60.0, max_keys=2)
    assert [buckets.take(key, 0.0)[0] for key in ("a", "b", "a", "b")] == [True, True, False, False]
    assert buckets.take("c", 0.0)[0]
    assert not buckets.take("b", 0.0)[0]
    assert buckets.take("a", 0.0)[0]
    assert (buckets.allowed, buckets.limited) == (4, 3)


def test_many_threads_get_exactly_what_is_there() -> None:
    """Not one more, not one less."""
    buckets, got, start = Buckets(1000, 1, 3600.0), [], threading.Barrier(8)

    def ask() -> None:
        start.wait()
        got.append(sum(buckets.take((), 0.0)[0] for _ in range(300)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 1000
    assert (buckets.allowed, buckets.limited) == (1000, 1400)
