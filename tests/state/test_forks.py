"""What another thread held when a process was forked does not stop the child."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.state import forks

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
