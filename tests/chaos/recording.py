"""What was promised, what was done, what came of it: kept by each test of chaos, and written as one page by the run.

`make chaos` writes docs/chaos.md of it; nobody writes that page by hand. Each test also gives back what it took: no
thread, task, file, socket or child process is left once its block is over.
"""

from __future__ import annotations

import asyncio
import datetime
import gc
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

IS_FULL = os.environ.get("MESHLIB_TEST_CHAOS") == "full"
"""The form of `make chaos`; `make test` takes the short one."""
REPORT = os.environ.get("MESHLIB_CHAOS_REPORT", "")
"""Where the page is written; "" is nowhere."""
PATIENCE = 15.0
"""Seconds until what is being closed has to be closed."""


@dataclass
class Record:
    """One row of the page. verdict: `held`, `BROKEN: ...`, or `not run: ...`."""

    test: str
    promise: str
    done: str
    measured: list[str] = field(default_factory=list)
    seconds: float = 0.0
    verdict: str = "held"


@dataclass(frozen=True)
class Held:
    """What this process holds of what has to be given back."""

    threads: Counter[str]
    files: Counter[str]
    children: frozenset[int]

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        # asyncio's own pool keeps its threads, and gRPC's core its wake-up descriptors: they are the process's.
        threads = Counter(each.name for each in threading.enumerate() if not each.name.startswith("asyncio_"))
        files: Counter[str] = Counter()
        for each in Path("/proc/self/fd").glob("*"):
            try:
                target = str(each.readlink())
            except OSError:
                continue
            kind = target.partition(":")[0]
            if kind != "anon_inode" and not target.startswith(("/dev/", "/proc/")):
                files[kind] += 1
        children: set[int] = set()
        for task in Path("/proc/self/task").glob("*/children"):
            try:
                children.update(map(int, task.read_text().split()))
            except OSError:  # a thread that has just ended
                pass
        return cls(threads, files, frozenset(children))

    def more_than(self, before: Held) -> list[str]:
        threads = [f"thread {name}" for name in (self.threads - before.threads).elements()]
        files = [f"{count} of {kind}" for kind, count in (self.files - before.files).items()]
        return threads + files + [f"process {pid}" for pid in self.children - before.children]


class Promise:
    """One promise while it is put to the test: `with promise(...) as told:`, or `async with` on an event loop."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def measured(self, what: str, value: float, unit: str = "s", at_most: float | None = None) -> None:
        """Kept for the page; and asserted where there is a bound, which has to allow for a busy machine."""
        bound = "" if at_most is None else f" (at most {at_most:.3g} {unit})"
        self.record.measured.append(f"{what}: {value:,.4g} {unit}{bound}".replace(" %", "%"))
        assert at_most is None or value <= at_most, f"{what}: {value:g} {unit}, and at most {at_most:g} is promised"

    def counted(self, what: str, number: int) -> None:
        self.record.measured.append(f"{what}: {number:,}")

    def _begin(self) -> None:
        self._before, self._began = Held.now(), time.monotonic()

    def _judge(self, error: BaseException | None) -> None:
        self.record.seconds = time.monotonic() - self._began
        if isinstance(error, pytest.skip.Exception):
            self.record.verdict = f"not run: {error.msg}"
        elif error is not None:
            first = (str(error) or repr(error)).splitlines()[0]
            self.record.verdict = f"**BROKEN**: {first[:200]}"

    def _left(self) -> list[str]:
        return Held.now().more_than(self._before)

    def _complain(self, left: list[str]) -> None:
        if left:
            self.record.verdict = "**BROKEN**: " + ", ".join(left)[:200] + " left over"
        assert not left, "left over"

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._judge(error)
        if error is None:
            until = time.monotonic() + PATIENCE
            while (left := self._left()) and time.monotonic() < until:
                time.sleep(0.05)
            self._complain(left)

    async def __aenter__(self) -> Self:
        self._tasks = asyncio.all_tasks()
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._judge(error)
        if error is None:
            until = time.monotonic() + PATIENCE
            while (left := self._left() + self._tasks_left()) and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            self._complain(left)

    def _tasks_left(self) -> list[str]:
        return [repr(each) for each in asyncio.all_tasks() - self._tasks]


Promising = Callable[[str, str], Promise]
_records: list[Record] = []


@pytest.fixture
def promise(request: pytest.FixtureRequest) -> Iterator[Promising]:
    """`promise(what is promised, what is done to it)`."""

    def make(promised: str, done: str) -> Promise:
        record = Record(request.node.name, " ".join(promised.split()), " ".join(done.split()))
        _records.append(record)
        return Promise(record)

    yield make


def write_report() -> None:
    """At the end of the run."""
    if REPORT and _records:
        Path(REPORT).write_text(page(_records, "full" if IS_FULL else "short"))


HEAD = """# Chaos

What fails around a meshed process, and what is promised meanwhile. This page is written by the run that it tells of:
`make chaos` takes the full form and writes it anew, `make chaos FORM=short` takes what `make test` takes. Servers count
what they carry out by the number of the call, so "lost" and "twice" are counted where they would happen. Every row
also asserts that no thread, task, socket, file or child process is left over.

Bounds in brackets are asserted; on a machine with more work than cores they are longer, by its load.

"""


def page(records: list[Record], form: str) -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    broken = sum("BROKEN" in each.verdict for each in records)
    absent = sum(each.verdict.startswith("not run") for each in records)
    held = len(records) - broken - absent
    lines = [
        f"- Run: {now}, {form} form, {sum(each.seconds for each in records):.0f} s",
        f"- Machine: {_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f} over the last 15 minutes",
        f"- Software: {platform.system()} {platform.release()}, Python {platform.python_version()}",
        f"- Verdict: {held} held, {broken} broken, {absent} not run",
        "",
        "| Promise | What was done | Measured | Verdict |",
        "|---|---|---|---|",
    ]
    for each in records:
        measured = "<br>".join([*each.measured, f"took {each.seconds:.0f} s"])
        row = (each.promise, each.done, measured, each.verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return HEAD + "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return found[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.machine()
