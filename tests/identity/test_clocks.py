"""Certificates end by the wall clock, which can be set, and waits do not: is a renewal due by the present time?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from certificates import TestCA
from meshlib.controlplane.ca import BACKDATED, DEFAULT_LIFETIME, CertificateAuthority
from meshlib.controlplane.own_identity import OwnIdentity
from meshlib.identity import ca_client
from meshlib.identity.access import Access
from meshlib.identity.ca_client import CaSource

HOUR = 3600.0


class Clock:
    """A wall clock that can be set."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Clocked:
    """The module `time` with another wall clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.time = clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ca_client, "time", Clocked(clock))
    monkeypatch.setattr(ca_client, "CLOCK_INTERVAL", 0.01)
    return clock


@pytest.fixture
def source(clock: Clock) -> CaSource:
    """It got its certificate now, and renews it in 12 hours."""
    source = CaSource(Access("127.0.0.1:1"))
    source._credentials = TestCA().credentials("reviews")
    source._renewed_at, source._renew_at = clock.now, clock.now + 12 * HOUR
    return source


@pytest.mark.parametrize("step", [13 * HOUR, -HOUR], ids=["forward", "back"])
def test_a_clock_that_is_set_makes_a_renewal_due(source: CaSource, clock: Clock, step: float) -> None:
    """While it waits for events. A machine that has slept looks the same; before, it waited its 12 hours."""
    events: SimpleQueue[bytes | str] = SimpleQueue()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(source._next_event(events)))
    waiting.start()
    clock.now += step
    waiting.join(10)
    events.put("over")
    waiting.join(10)
    assert found == [None]


def test_a_clock_that_is_corrected_by_seconds_makes_none_due(source: CaSource, clock: Clock) -> None:
    """As it is every day; what comes meanwhile is told."""
    events: SimpleQueue[bytes | str] = SimpleQueue()
    for step in (5.0, -10.0):
        clock.now += step
        events.put("told")
        assert source._next_event(events) == "told"


def test_a_certificate_that_was_refused_makes_way_for_a_join_token(tmp_path: Path) -> None:
    """It is good by this clock, and was not by the CA's; the token is for joins alone."""
    (tmp_path / "token").write_text("mjt_new")
    held = TestCA().credentials("reviews")
    access = Access("127.0.0.1:1", token_file=tmp_path / "token", credentials=lambda: held)
    assert access.metadata(may_join=True, prefers_token=True) == (("authorization", "Bearer mjt_new"),)
    for shown in (access.metadata(may_join=True), access.metadata(prefers_token=True)):
        assert "mjt_" not in shown[0][1]


def test_an_expired_certificate_says_what_has_to_be_done(source: CaSource, clock: Clock) -> None:
    """The log line of a failed renewal names the setting."""
    assert source._advice() == ""
    clock.now += 48 * HOUR
    assert "MESHLIB_TOKEN_FILE" in source._advice()


def test_the_control_planes_own_certificate_follows_its_clock() -> None:
    """Half of its life forward, or back to before it begins."""
    clock = Clock()
    own = OwnIdentity(CertificateAuthority("cluster.local", clock=clock), (), clock)
    assert own.if_due() is not None
    for step in (0.0, DEFAULT_LIFETIME / 4, -DEFAULT_LIFETIME / 4, -BACKDATED / 2):
        clock.now += step
        assert own.if_due() is None
    for step in (-2 * BACKDATED, DEFAULT_LIFETIME):
        clock.now += step
        assert own.if_due() is not None
        assert own.if_due() is None
