"""Claims about long work on one thread: everything is done, and others get their turn in between."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from meshlib.state.turns import EVERY, resting


def test_everything_comes_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rest after so many, and none for few."""
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    assert list(resting(range(EVERY - 1))) == list(range(EVERY - 1)) and rests == []
    assert list(resting(iter(range(3 * EVERY + 1)))) == list(range(3 * EVERY + 1)) and len(rests) == 3


def test_another_thread_gets_the_interpreter_meanwhile() -> None:
    """Though it would have to wait for a second, by the switch interval that is set here."""
    before, turns, is_over = sys.getswitchinterval(), 0, threading.Event()
    sys.setswitchinterval(1.0)

    def other() -> None:
        nonlocal turns
        while not is_over.is_set():
            turns += 1
            time.sleep(0)

    thread = threading.Thread(target=other)
    try:
        thread.start()
        for _ in resting(range(20 * EVERY)):
            pass
        assert turns > 1
    finally:
        sys.setswitchinterval(before)
        is_over.set()
        thread.join(10)
