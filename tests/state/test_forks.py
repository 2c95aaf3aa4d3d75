"""What another thread held when a process was forked does not stop the child."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.model import BreakerRules, Cluster
from meshlib.state import forks
from meshlib.state.shared_breaker import SharedBreakers
from snapshots import mesh, service

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),  # Python 3.12, of forks beside threads
]


def in_child(act: Callable[[], object]) -> int:
    """Its exit code; that of SIGALRM where it stops."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_lock_that_another_thread_holds_is_open_in_the_child() -> None:
    """And still held in the parent."""
    lock, held, over = forks.lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:
        assert in_child(lock.acquire) == 0
        assert lock.locked()
    finally:
        over.set()
        thread.join(10)


def test_a_fork_waits_for_an_import_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the feed that a first call has started. The child would wait for a thread that it does not have."""
    (tmp_path / "imported_while_forking.py").write_text(
        "import threading\nbegun, over = threading.begun, threading.over\nbegun.set()\nover.wait(1)\n"
    )
    begun = threading.Event()
    monkeypatch.setattr(threading, "begun", begun, raising=False)
    monkeypatch.setattr(threading, "over", threading.Event(), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=importlib.import_module, args=("imported_while_forking",))
    thread.start()
    try:
        assert begun.wait(10)
        assert in_child(lambda: importlib.import_module("imported_while_forking")) == 0
    finally:
        thread.join(10)
        sys.modules.pop("imported_while_forking", None)


def test_a_fork_waits_for_what_must_not_be_cut_in_two() -> None:
    """msgspec's knowledge of a type, say: with half of it the child crashes."""
    held, done = threading.Event(), threading.Event()

    def work() -> None:
        with forks.whole:
            held.set()
            time.sleep(0.2)
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(10)

    def see() -> None:
        assert done.is_set()
        assert forks.whole.acquire(timeout=0)

    assert in_child(see) == 0
    thread.join(10)
    with forks.whole:  # the parent's is free again
        pass


def test_an_import_that_takes_too_long_is_begun_anew_by_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is one that begins while others' hooks run. The child gets the module whole, and the parent its own."""
    (tmp_path / "imported_for_long.py").write_text(
        "import threading\nparent = not threading.begun.is_set()\nthreading.begun.set()\n"
        "parent and threading.over.wait(60)\nwhole = True\n"
    )
    begun, over = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "begun", begun, raising=False)
    monkeypatch.setattr(threading, "over", over, raising=False)
    monkeypatch.setattr(forks, "LONGEST_IMPORT", 0.0)
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=importlib.import_module, args=("imported_for_long",))
    thread.start()
    try:
        assert begun.wait(10)
        assert in_child(lambda: importlib.import_module("imported_for_long").whole) == 0
    finally:
        over.set()
        thread.join(10)
    assert sys.modules.pop("imported_for_long").whole


def test_an_import_that_never_ends_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may be a server that runs while it is imported: no fork of its threads waits again."""
    (tmp_path / "imported_for_ever.py").write_text("import threading\nthreading.begun.set()\nthreading.over.wait(60)\n")
    begun, over = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "begun", begun, raising=False)
    monkeypatch.setattr(threading, "over", over, raising=False)
    monkeypatch.setattr(forks, "LONGEST_IMPORT", 0.1)
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=importlib.import_module, args=("imported_for_ever",))
    thread.start()
    try:
        assert begun.wait(10)
        assert in_child(bool) == 0
        monkeypatch.setattr(forks, "LONGEST_IMPORT", 60.0)
        began = time.monotonic()
        assert in_child(bool) == 0
        assert time.monotonic() - began < 30
    finally:
        over.set()
        thread.join(10)
        sys.modules.pop("imported_for_ever", None)


def test_of_two_threads_that_fork_at_once_each_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other's time was over before it had anything to give back."""
    held, over = threading.Event(), threading.Event()

    def fork_slowly() -> None:
        forks._await_others()
        held.set()
        over.wait(60)
        forks._go_on()

    thread = threading.Thread(target=fork_slowly)
    thread.start()
    assert held.wait(10)
    monkeypatch.setattr(forks, "LONGEST_IMPORT", 0.01)
    forks._await_others()
    forks._go_on()
    over.set()
    thread.join(10)
    assert forks.whole.acquire(timeout=10)
    forks.whole.release()


def test_a_fork_from_within_an_import_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this very thread imports is no reason: the child goes on with it."""
    (tmp_path / "forks_while_imported.py").write_text(
        "import os, time\nbegan = time.monotonic()\nchild = os.fork()\n"
        "if not child:\n    os._exit(0)\nos.waitpid(child, 0)\ntook = time.monotonic() - began\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert importlib.import_module("forks_while_imported").took < forks.LONGEST_IMPORT
    finally:
        sys.modules.pop("forks_while_imported", None)


def test_a_breaker_wakes_nobody_of_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose thread may have held, when the process was forked, what a change of state wakes it by."""
    pytest.importorskip("redis")
    monkeypatch.setattr(SharedBreakers, "_run", lambda self: None)
    given = service("reviews:9080", [("127.0.0.1", 1)], cluster=Cluster("c", breaker=BreakerRules(1)))
    with mesh(given, breaker_storage="redis://127.0.0.1:1/0") as here:
        shared, breaker = here._feed._shared_breakers, here.breaker("reviews:9080")
        assert shared is not None
        assert breaker is not None
        held, over = threading.Event(), threading.Event()

        def hold() -> None:
            with shared._news._cond:  # type: ignore[attr-defined]
                held.set()
                over.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(10)
        try:
            assert in_child(breaker.open) == 0
        finally:
            over.set()
            thread.join(10)
