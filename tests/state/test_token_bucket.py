"""Does a bucket give exactly what it has, whoever asks, and forget no more than it must?"""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from meshlib.state.token_bucket import Buckets, TokenBucket


def test_it_is_full_at_first_and_filled_in_steps() -> None:
    """Envoy's tokens_per_fill and fill_interval; never more than max_tokens."""
    bucket = TokenBucket(3, 2, 10.0, now=100.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(109.9)
    assert bucket.next_fill(109.0) == 1.0
    assert [bucket.take(110.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(500.0) for _ in range(4)] == [True, True, True, False]


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0.1, 10),
    st.lists(st.floats(0, 5, allow_nan=False), min_size=1, max_size=200),
)
def test_in_no_stretch_more_pass_than_the_bucket_and_its_fills(
    most: int, per_fill: int, interval: float, pauses: list[float]
) -> None:
    """Whatever the pattern of calls."""
    now, bucket, passed = 0.0, TokenBucket(most, per_fill, interval, 0.0), []
    for pause in pauses:
        now += pause
        if bucket.take(now):
            passed.append(now)
        assert 0 <= bucket.tokens <= most
    for start in range(len(passed)):
        stretch = now - passed[start]
        assert len(passed) - start <= most + (int(stretch / interval) + 1) * per_fill


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
