"""Threads carry what the request that started them carries, and no other thread notices."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from meshlib.inbound import threads
from meshlib.policy.propagation import Carried, current

JASON = Carried(((b"end-user", b"jason"),))


@pytest.fixture(autouse=True)
def wrapped() -> Iterator[None]:
    threads.install()
    yield
    threads.install()  # other tests' applications rely on it; installing is for the life of a process


@contextmanager
def serving(carried: Carried = JASON) -> Iterator[None]:
    token = current.set(carried)
    try:
        yield
    finally:
        current.reset(token)


def seen_by(start: Callable[[Callable[[], None]], None]) -> Carried | None:
    """What is in force on the thread on which `start` runs its argument."""
    found: list[Carried | None] = []
    done = threading.Event()

    def look() -> None:
        found.append(current.get())
        done.set()

    start(look)
    assert done.wait(10)
    return found[0]


def test_a_thread_carries() -> None:
    """A target, and a subclass's own run()."""

    class Worker(threading.Thread):
        def __init__(self, work: Callable[[], None]) -> None:
            super().__init__()
            self._work = work

        def run(self) -> None:
            self._work()

    with serving():
        assert seen_by(lambda work: threading.Thread(target=work).start()) is JASON
        assert seen_by(lambda work: Worker(work).start()) is JASON
        assert seen_by(lambda work: threading.Timer(0, work).start()) is JASON


def test_a_thread_of_a_thread_carries() -> None:
    """However deep the work is split."""
    with serving():
        assert seen_by(lambda work: threading.Thread(target=threading.Thread(target=work).start).start()) is JASON


def test_threads_outside_of_a_request_carry_nothing() -> None:
    """Neither those of the process, nor those started after a request has ended."""
    with serving():
        pass
    assert seen_by(lambda work: threading.Thread(target=work).start()) is None


def test_a_pools_work_carries_and_its_threads_do_not() -> None:
    """The pool's thread is born in jason's request and serves others afterwards."""
    with ThreadPoolExecutor(1) as pool:
        with serving():
            assert pool.submit(current.get).result(10) is JASON
            assert list(pool.map(lambda _: current.get(), range(3))) == [JASON] * 3
        assert pool.submit(current.get).result(10) is None
        mary = Carried(((b"end-user", b"mary"),))
        with serving(mary):
            assert pool.submit(current.get).result(10) is mary


def test_a_pools_results_and_failures_are_its_works() -> None:
    """Arguments, results and exceptions are those of the function."""
    with ThreadPoolExecutor(1) as pool, serving():
        assert pool.submit(divmod, 7, 2).result(10) == (3, 1)
        assert pool.submit(int, "ff", base=16).result(10) == 255
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 7, 0).result(10)


async def test_a_loops_executor_carries() -> None:
    """run_in_executor, which takes no context along by itself, and to_thread, which does."""
    loop = asyncio.get_running_loop()
    with serving():
        assert await loop.run_in_executor(None, current.get) is JASON
        assert await asyncio.to_thread(current.get) is JASON
    assert await loop.run_in_executor(None, current.get) is None


def test_a_thread_is_freed_as_any_other() -> None:
    """Nothing of the wrapping keeps it, or the request, once it has run."""
    with serving():
        thread = threading.Thread(target=lambda: None)
        thread.start()
    thread.join()
    gc.disable()
    try:
        left = weakref.ref(thread)
        del thread
        assert left() is None
    finally:
        gc.enable()


def test_a_thread_that_cannot_start_says_so() -> None:
    """Twice, as without the wrapping."""
    with serving():
        thread = threading.Thread(target=lambda: None)
        thread.start()
        with pytest.raises(RuntimeError, match="once"):
            thread.start()
        thread.join()


def test_installing_twice_wraps_once_and_uninstalling_removes_it() -> None:
    """Every wrapped application installs; what was there before comes back."""
    threads.install()
    threads.uninstall()
    bare = (threading.Thread.start, ThreadPoolExecutor.submit)
    with serving():
        assert seen_by(lambda work: threading.Thread(target=work).start()) is None
    threads.install()
    assert threading.Thread.start is not bare[0]
    threads.uninstall()
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == bare
    assert threading.Thread.start.__name__ == "start"


def test_another_librarys_wrapping_stays() -> None:
    """Ours is then underneath: silent after uninstall(), and in force once again after install()."""
    threads.install()
    ours = threading.Thread.start
    calls: list[str] = []

    @functools.wraps(ours)
    def theirs(self: threading.Thread) -> None:
        calls.append(self.name)
        ours(self)

    threading.Thread.start = theirs  # type: ignore[method-assign]
    try:
        threads.uninstall()
        assert threading.Thread.start is theirs
        with serving():
            assert seen_by(lambda work: threading.Thread(target=work, name="a").start()) is None
            threads.install()
            assert threading.Thread.start is theirs
            assert seen_by(lambda work: threading.Thread(target=work, name="b").start()) is JASON
    finally:
        threading.Thread.start = ours  # type: ignore[method-assign]
    assert calls == ["a", "b"]
