"""How do threads that a handler starts know which request they serve?

A task inherits its creator's context variables; a thread does not before Python 3.14, and by default not there either
(sys.flags.thread_inherit_context). So two methods are wrapped while an application is: threading.Thread.start, and
ThreadPoolExecutor.submit, through which map(), loop.run_in_executor and asyncio.to_thread go. OpenTelemetry's
instrumentation of threading wraps the same two.

Only the one variable is handed over, and only while a request is served: everything else runs as if this file did not
exist. As with tasks, what a thread was given it keeps: one that a request happens to start and that serves others
afterwards should be started before the first request. Other processes (ProcessPoolExecutor) are not reached.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from meshlib.policy.propagation import Carried, current
from meshlib.state import forks

T = TypeVar("T")

_lock = forks.lock()
_is_installed = False
_start: Any = None
_submit: Any = None
"""The methods underneath ours, while ours are in place."""


def install() -> None:
    """Wrap the two methods. Idempotent; the applications' middleware calls it."""
    global _is_installed, _start, _submit
    with _lock:
        _is_installed = True
        wrapped: Any
        if _start is None:
            _start = threading.Thread.start
            wrapped = functools.wraps(_start)(_carrying_start)
            threading.Thread.start = wrapped  # type: ignore[method-assign]
        if _submit is None:
            _submit = ThreadPoolExecutor.submit
            wrapped = functools.wraps(_submit)(_carrying_submit)
            ThreadPoolExecutor.submit = wrapped  # type: ignore[method-assign]


def uninstall() -> None:
    """Undo install(). Where another library has wrapped ours since, ours stays underneath and hands nothing over."""
    global _is_installed, _start, _submit
    with _lock:
        _is_installed = False
        if threading.Thread.start is _carrying_start:
            threading.Thread.start, _start = _start, None  # type: ignore[method-assign]
        if ThreadPoolExecutor.submit is _carrying_submit:
            ThreadPoolExecutor.submit, _submit = _submit, None  # type: ignore[method-assign]


def _to_carry() -> Carried | None:
    return current.get() if _is_installed else None


def _carrying_start(self: threading.Thread) -> None:
    start, carried = _start or threading.Thread.start, _to_carry()
    if carried is not None:
        run = self.run  # of the instance, so that a subclass's own run() is served too

        def carrying_run() -> None:
            self.__dict__.pop("run", None)  # the thread would otherwise hold itself
            current.set(carried)
            run()

        self.run = carrying_run  # type: ignore[method-assign]
    start(self)


def _carrying_submit(self: ThreadPoolExecutor, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
    submit, carried = _submit or ThreadPoolExecutor.submit, _to_carry()
    result: Future[T]
    if carried is None:
        result = submit(self, fn, *args, **kwargs)
        return result
    # The pool's own thread, which this may start, serves others afterwards: it gets nothing, the work does.
    token = current.set(None)
    try:
        result = submit(self, functools.partial(_carrying, carried, fn), *args, **kwargs)
    finally:
        current.reset(token)
    return result


def _carrying(carried: Carried, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    token = current.set(carried)
    try:
        return fn(*args, **kwargs)
    finally:
        current.reset(token)
