"""What is left to a forked child that another thread held at that moment? Locks that nobody gives back; here they are.

- Locks that live as long as the process are made by `lock()`: a child gets them open. What they guard is counters, of
  which one may be half an addition behind; a child that waits for ever is worse.
- An import that is under way in another thread is waited for before the fork. A module's lock is otherwise held in the
  child by a thread that it does not have (CPython renews the lock of all imports, and not those of single modules), and
  the child stops at its own first use of that module.
- `with whole:` is for what a fork must not cut in two. msgspec makes what it knows of a type at the first use of it,
  and crashes a process that finds half of that.
- An import that began all the same, since other libraries' hooks run between, is begun anew by the child: the half of
  the module that is there is dropped, with its lock.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

LONGEST_IMPORT = 10.0
"""Seconds for which a fork waits. An import that takes longer may itself wait for whoever forks."""
_POLL = 0.002

whole = threading.RLock()
"""Held for a moment only, and never while something is waited for: a fork waits for it, and it for a fork."""


class _Forking(threading.local):
    """What the hooks of one fork tell each other: two threads may fork at once."""

    has_whole = False


_forking = _Forking()
_in_vain: weakref.WeakSet[Any] = weakref.WeakSet()
"""Locks of modules that a fork has waited for until its time was over: an import may be a server that runs."""

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.Lock:
    """A lock that is open in a forked child, whoever held it."""
    made = threading.Lock()
    reopen(made)
    return made


def reopen(lock: Any) -> None:
    """Let `lock`, a Lock or RLock that somebody else has made, be open in a forked child as well."""
    _locks.add(lock)


def _repair() -> None:
    """In the child, before anything else of ours."""
    whole._at_fork_reinit()  # type: ignore[attr-defined]
    for each in list(_locks):
        each._at_fork_reinit()  # what the standard library does with its own
    by_name = _module_locks()
    for name in [name for name, held in list(by_name.items()) if _is_elsewhere(held)]:
        del by_name[name]
        if getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
            del sys.modules[name]


def _await_others() -> None:
    until = time.monotonic() + LONGEST_IMPORT
    while waited_for := _imports_elsewhere():
        if time.monotonic() >= until:
            _in_vain.update(waited_for)
            break
        time.sleep(_POLL)
    _forking.has_whole = whole.acquire(timeout=LONGEST_IMPORT)


def _go_on() -> None:
    """In the parent."""
    if _forking.has_whole:
        whole.release()


def _imports_elsewhere() -> list[Any]:
    """The locks of the modules that other threads import, but for those that were waited for in vain."""
    found = [held() for held in list(_module_locks().values()) if _is_elsewhere(held)]
    return [lock for lock in found if lock is not None and lock not in _in_vain]


def _is_elsewhere(held: Callable[[], Any]) -> bool:
    """Whether another thread is within the import of the module whose lock this is, by a weak reference."""
    return getattr(held(), "owner", None) not in (None, threading.get_ident())


def _module_locks() -> dict[str, Callable[[], Any]]:
    # Nothing public tells. Where a Python has it otherwise, forks are as they were.
    found: dict[str, Callable[[], Any]] = getattr(getattr(importlib, "_bootstrap", None), "_module_locks", {})
    return found


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_await_others, after_in_parent=_go_on, after_in_child=_repair)
