"""What is left to a forked child that another thread held at that moment? Locks that nobody gives back; here they are.

- Locks that live as long as the process are made by `lock()`: a child gets them open. What they guard is counters, of
  which one may be half an addition behind; a child that waits for ever is worse.
- An import that is under way in another thread is waited for before the fork. A module's lock is otherwise held in the
  child by a thread that it does not have (CPython renews the lock of all imports, and not those of single modules), and
  the child stops at its own first use of that module.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

LONGEST_IMPORT = 10.0
"""Seconds for which a fork waits. An import that takes longer may itself wait for whoever forks."""
_POLL = 0.002

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.Lock:
    """A lock that is open in a forked child, whoever held it."""
    made = threading.Lock()
    reopen(made)
    return made


def reopen(lock: Any) -> None:
    """Let `lock`, a Lock or RLock that somebody else has made, be open in a forked child as well."""
    _locks.add(lock)


def _reopen() -> None:
    for each in list(_locks):
        each._at_fork_reinit()  # what the standard library does with its own


def _await_imports() -> None:
    until = time.monotonic() + LONGEST_IMPORT
    while _importing_elsewhere() and time.monotonic() < until:
        time.sleep(_POLL)


def _importing_elsewhere() -> bool:
    """Whether another thread is within an import."""
    me = threading.get_ident()
    return any(getattr(each, "owner", None) not in (None, me) for each in _module_locks())


def _module_locks() -> Iterable[Any]:
    # Nothing public tells. Where a Python has it otherwise, forks are as they were.
    by_name: dict[str, Any] = getattr(getattr(importlib, "_bootstrap", None), "_module_locks", {})
    return [found for reference in list(by_name.values()) if (found := reference()) is not None]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_await_imports, after_in_child=_reopen)
