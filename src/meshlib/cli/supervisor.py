"""What keeps a set of processes running, and leaves none behind?

Rules
- Every program runs in a process group of its own, so a terminal's Ctrl-C reaches only us, and what a program forks is
  ended together with it.
- Its output goes straight to its log file: nothing to pump, nothing lost, no broken pipe.
- It ends: it is started again, after a delay that doubles with each early end and returns to the first one once the
  program has lived for `settled` seconds.
- stop(): SIGTERM to all groups, SIGKILL to what is left after `grace` seconds.
- We end without stop(), even by SIGKILL: the warden (warden.py) does the same. A program's command begins only after
  the warden knows its group: until then it is a shell that waits for one line from us and leaves if it gets none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from meshlib.cli import warden

WAIT_FOR_GO = 'read -r go || exit 0; exec "$@" </dev/null'
CANNOT_START = 126
"""The exit code of a program that can't be started; a shell's for a command it can't execute."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. environment is added to ours. log: where stdout and stderr are appended."""

    name: str
    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


class Change(StrEnum):
    STARTED = "started"
    ENDED = "ended"
    """By itself; it will be started again after `Event.delay` seconds."""
    STOPPED = "stopped"
    """Because stop() was called."""


@dataclass(frozen=True, slots=True)
class Event:
    """exit_code: a negative one is the signal's number. early: how many ends in a row, with this one, came too soon."""

    program: Program
    change: Change
    pid: int
    exit_code: int = 0
    delay: float = 0.0
    early: int = 0

    def __str__(self) -> str:
        match self.change:
            case Change.STARTED:
                return f"{self.program.name} started (pid {self.pid})"
            case Change.ENDED:
                return f"{self.program.name} {self.reason}; starting it again in {self.delay:g} s ({self.program.log})"
            case Change.STOPPED:
                return f"{self.program.name} stopped"

    @property
    def reason(self) -> str:
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code}"
        try:
            return f"was ended by {signal.Signals(-self.exit_code).name}"
        except ValueError:
            return f"was ended by signal {-self.exit_code}"


async def nothing(_: Program) -> None:
    """Needs no preparation."""


class Supervisor:
    """Runs programs until stop(). Belongs to one event loop.

    tell is called on that loop with every Event, in order; it must not block, and must not raise.
    prepare is awaited before each start of a program, the later ones too; it must end soon, and must not raise.
    """

    def __init__(
        self,
        tell: Callable[[Event], None] = lambda event: None,
        *,
        prepare: Callable[[Program], Awaitable[None]] = nothing,
        first_delay: float = 0.5,
        longest_delay: float = 10.0,
        settled: float = 10.0,
        grace: float = 5.0,
    ) -> None:
        self._tell, self._prepare = tell, prepare
        self._first_delay, self._longest_delay, self._settled = first_delay, longest_delay, settled
        self._grace = grace
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._groups: dict[str, int] = {}
        self._stopping = asyncio.Event()
        self._warden: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self, program: Program) -> None:
        """Run `program` from now on. A program that can't be started at all is an Event like one that ended."""
        if program.name in self._tasks:
            raise ValueError(f"{program.name} is already running")
        if self._stopping.is_set():
            raise ValueError("the supervisor was stopped")
        self._tasks[program.name] = asyncio.get_running_loop().create_task(self._keep(program), name=program.name)

    def pid(self, name: str) -> int | None:
        """Process id of a program, while it runs."""
        return self._groups.get(name)

    async def stop(self) -> None:
        """End all programs; returns when none is left. Idempotent."""
        self._stopping.set()
        self._signal_all(signal.SIGTERM)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=self._grace)
            if late:
                self._signal_all(signal.SIGKILL)
                await asyncio.wait(late)
        if self._warden is not None and self._warden.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._warden.stdin.close()
            await asyncio.to_thread(self._warden.wait)
            self._warden = None

    def _signal_all(self, number: signal.Signals) -> None:
        for group in self._groups.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    async def _keep(self, program: Program) -> None:
        early, delay = 0, self._first_delay
        while not self._stopping.is_set():
            await self._prepare(program)
            began = time.monotonic()
            pid, exit_code = await self._run_once(program)
            if self._stopping.is_set():
                self._tell(Event(program, Change.STOPPED, pid, exit_code))
                return
            if time.monotonic() - began >= self._settled:
                early, delay = 0, self._first_delay
            early += 1
            self._tell(Event(program, Change.ENDED, pid, exit_code, delay, early))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(delay * 2, self._longest_delay)

    async def _run_once(self, program: Program) -> tuple[int, int]:
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with program.log.open("ab", buffering=0) as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *("/bin/sh", "-c", WAIT_FOR_GO, "sh"),
                    *program.command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    cwd=program.folder,
                    env={**os.environ, **program.environment},
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{program.name} could not be started: {error}\n".encode())
                return 0, CANNOT_START
        group = process.pid
        self._groups[program.name] = group
        self._tell_warden(b"+%d\n" % group)
        assert process.stdin is not None
        if not self._stopping.is_set():  # else stop() may have missed this one: without its line it leaves by itself
            process.stdin.write(b"go\n")
            self._tell(Event(program, Change.STARTED, group))
        process.stdin.close()
        exit_code = await process.wait()
        # What the program forked and left behind would keep its port.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        del self._groups[program.name]
        self._tell_warden(b"-%d\n" % group)
        return group, exit_code

    def _tell_warden(self, line: bytes) -> None:
        if self._warden is not None and self._warden.stdin is not None:
            try:
                self._warden.stdin.write(line)
                return
            except BrokenPipeError:  # somebody killed it: another one takes over
                self._warden.stdin.close()
                self._warden.wait()
        self._warden = subprocess.Popen(
            # -I -S: neither site-packages nor the user's environment can keep it from starting.
            [sys.executable, "-I", "-S", str(Path(warden.__file__)), str(self._grace)],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self._warden.stdin is not None
        self._warden.stdin.write(b"".join(b"+%d\n" % group for group in self._groups.values()))

    def __repr__(self) -> str:
        return f"<Supervisor {len(self._groups)} of {len(self._tasks)} programs running>"
