"""The supervisor with real processes: started again, stopped cleanly, never orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.cli.supervisor import CANNOT_START, WAIT_FOR_GO, Change, Event, Program, Supervisor
from meshlib.cli.warden import read_groups

pytestmark = pytest.mark.processes


class Story:
    """Collects events and lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        task = asyncio.get_running_loop().create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, enough: Callable[[list[Event]], bool]) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: enough(self.events))

    def changes(self, name: str) -> list[Change]:
        return [event.change for event in self.events if event.program.name == name]


def shell(name: str, script: str, folder: Path, **environment: str) -> Program:
    return Program(name, ("/bin/sh", "-c", script), folder / f"{name}.log", environment)


async def logged(program: Program, text: str) -> str:
    """The log, once it holds `text`. A file has no event to wait for that every platform knows."""
    async with asyncio.timeout(20):
        while not program.log.exists() or text not in program.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return program.log.read_text()


def ended(events: list[Event]) -> bool:
    return bool(events) and events[-1].change is Change.ENDED


def gone(pid: int) -> bool:
    """Whether no process of that id runs; a zombie that nobody has reaped does not run."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip()[:1] in ("", "Z")


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


async def test_output_and_environment_arrive_in_the_log(tmp_path: Path) -> None:
    """stdout, stderr and the program's own environment are seen in its log file."""
    program = shell("talker", 'echo "out $WORD"; echo err >&2; exec sleep 60', tmp_path / "logs", WORD="mesh")
    async with Supervisor() as supervisor:
        supervisor.start(program)
        assert await logged(program, "err") == "out mesh\nerr\n"


async def test_program_that_ends_is_started_again_with_growing_delay(tmp_path: Path) -> None:
    """Each early end doubles the delay up to the longest one; its exit code is told."""
    story = Story()
    async with Supervisor(story, first_delay=0.01, longest_delay=0.04) as supervisor:
        supervisor.start(shell("short", "exit 3", tmp_path))
        await story.until(lambda events: sum(event.change is Change.ENDED for event in events) == 4)
    ends = [event for event in story.events if event.change is Change.ENDED][:4]
    assert [(event.exit_code, event.delay, event.early) for event in ends] == [
        (3, 0.01, 1),
        (3, 0.02, 2),
        (3, 0.04, 3),
        (3, 0.04, 4),
    ]
    assert "short ended with exit code 3; starting it again in 0.01 s" in str(ends[0])


async def test_a_program_is_prepared_before_each_start(tmp_path: Path) -> None:
    """The later ones too: what a start needs may be good once."""
    prepared: list[str] = []

    async def prepare(program: Program) -> None:
        (tmp_path / "token").write_text(f"token {len(prepared)}")
        prepared.append(program.name)

    story = Story()
    program = shell("short", 'cat "$TOKEN"; echo', tmp_path, TOKEN=str(tmp_path / "token"))
    async with Supervisor(story, first_delay=0.05, prepare=prepare) as supervisor:
        supervisor.start(program)
        await story.until(lambda events: len([each for each in events if ended([each])]) >= 2)
    assert program.log.read_text().splitlines()[:2] == ["token 0", "token 1"]
    assert set(prepared) == {"short"}


async def test_program_that_had_settled_starts_again_after_the_first_delay(tmp_path: Path) -> None:
    """A program that lived long enough is not punished for its earlier ends."""
    story = Story()
    async with Supervisor(story, first_delay=0.01, settled=0.0) as supervisor:
        supervisor.start(shell("short", "exit 0", tmp_path))
        await story.until(lambda events: sum(event.change is Change.ENDED for event in events) == 3)
    assert {event.delay for event in story.events if event.change is Change.ENDED} == {0.01}


async def test_killed_program_is_started_again_and_the_signal_is_named(tmp_path: Path) -> None:
    """SIGKILL from outside looks like any other end."""
    story = Story()
    async with Supervisor(story, first_delay=0.01) as supervisor:
        supervisor.start(shell("victim", "exec sleep 60", tmp_path))
        await story.until(lambda events: len(events) == 1)
        first = supervisor.pid("victim")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await story.until(lambda events: len(events) == 3)
        assert supervisor.pid("victim") not in (None, first)
    assert story.changes("victim") == [Change.STARTED, Change.ENDED, Change.STARTED, Change.STOPPED]
    assert "was ended by SIGKILL" in str(story.events[1])


async def test_stop_ends_grandchildren_and_leaves_nobody(tmp_path: Path) -> None:
    """What a program forked is ended with it."""
    program = shell("parent", "sleep 60 & echo child $!; wait", tmp_path)
    async with Supervisor() as supervisor:
        supervisor.start(program)
        child = int((await logged(program, "child")).split()[1])
        leader = supervisor.pid("parent")
    assert leader is not None
    wait_until_gone(leader, child)


async def test_program_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    """stop() is bounded: who does not listen to SIGTERM gets SIGKILL."""
    story = Story()
    stubborn = shell("stubborn", "trap '' TERM; echo ready; while :; do sleep 60; done", tmp_path)
    async with Supervisor(story, grace=0.3) as supervisor:
        supervisor.start(stubborn)
        await logged(stubborn, "ready")
        began = time.monotonic()
    assert 0.3 <= time.monotonic() - began < 10
    assert story.events[-1].change is Change.STOPPED
    assert story.events[-1].exit_code == -signal.SIGKILL


async def test_leftovers_of_a_dead_leader_are_ended_before_it_starts_again(tmp_path: Path) -> None:
    """A worker that outlives its master would keep the port that the new master needs."""
    story = Story()
    program = shell("master", "sleep 60 & echo worker $!; exit 1", tmp_path)
    async with Supervisor(story, first_delay=60) as supervisor:
        supervisor.start(program)
        await story.until(ended)
        worker = int((await logged(program, "worker")).split()[1])
        wait_until_gone(worker)


async def test_stop_does_not_wait_for_a_restart_that_is_far_away(tmp_path: Path) -> None:
    """A program between two lives is simply not started again."""
    story = Story()
    async with Supervisor(story, first_delay=600, longest_delay=600) as supervisor:
        supervisor.start(shell("short", "exit 1", tmp_path))
        await story.until(ended)
        began = time.monotonic()
    assert time.monotonic() - began < 5


async def test_command_that_does_not_exist_is_told_and_logged(tmp_path: Path) -> None:
    """The supervisor survives a program that can't be started, and says where to look."""
    story = Story()
    missing_command = Program("nobody", ("/no/such/command",), tmp_path / "nobody.log")
    missing_folder = Program("nowhere", ("true",), tmp_path / "nowhere.log", folder=tmp_path / "missing")
    async with Supervisor(story, first_delay=60) as supervisor:
        supervisor.start(missing_command)
        supervisor.start(missing_folder)
        await story.until(lambda events: sum(event.change is Change.ENDED for event in events) == 2)
    codes = {event.program.name: event.exit_code for event in story.events if event.change is Change.ENDED}
    assert codes == {"nobody": 127, "nowhere": CANNOT_START}
    assert "/no/such/command" in missing_command.log.read_text()
    assert "nowhere could not be started" in missing_folder.log.read_text()


async def test_a_name_runs_once_and_nothing_starts_after_stop(tmp_path: Path) -> None:
    """Both are mistakes of the caller and are said at once."""
    program = shell("one", "exec sleep 60", tmp_path)
    async with Supervisor() as supervisor:
        supervisor.start(program)
        with pytest.raises(ValueError, match="one is already running"):
            supervisor.start(program)
    with pytest.raises(ValueError, match="stopped"):
        supervisor.start(shell("late", "true", tmp_path))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_no_orphan_when_the_supervisor_itself_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """The warden ends every group, also one that ignores SIGTERM, and then itself."""
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(
            """
            import asyncio, signal, sys
            from pathlib import Path
            from meshlib.cli.supervisor import Program, Supervisor

            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have used nohup
            folder = Path(sys.argv[1])
            SCRIPT = "trap '' TERM; sleep 600 & echo pids $$ $!; wait; sleep 600"

            async def main():
                supervisor = Supervisor(grace=0.2)
                for name in ("a", "b"):
                    supervisor.start(Program(name, ("/bin/sh", "-c", SCRIPT), folder / f"{name}.log"))
                logs = [folder / "a.log", folder / "b.log"]
                while not all(log.exists() and "pids" in log.read_text() for log in logs):
                    await asyncio.sleep(0.01)
                print("warden", supervisor._warden.pid, flush=True)
                await asyncio.sleep(600)

            asyncio.run(main())
            """
        )
    )
    with subprocess.Popen([sys.executable, str(parent), str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pids = [int(process.stdout.readline().split()[1])]
            for name in "ab":
                pids += [int(word) for word in (tmp_path / f"{name}.log").read_text().split()[1:]]
            assert len(pids) == 5
            assert not any(gone(pid) for pid in pids)
            process.send_signal(number)
            process.wait(20)
            wait_until_gone(*pids)
        finally:
            process.kill()


async def test_a_killed_warden_is_replaced(tmp_path: Path) -> None:
    """The next change of any program starts another warden that knows all groups."""
    story = Story()
    async with Supervisor(story, first_delay=0.01) as supervisor:
        supervisor.start(shell("a", "exec sleep 60", tmp_path))
        await story.until(lambda events: len(events) == 1)
        first = supervisor._warden
        assert first is not None
        first.kill()
        wait_until_gone(first.pid)
        supervisor.start(shell("b", "exec sleep 60", tmp_path))
        await story.until(lambda events: len(events) == 2)
        second = supervisor._warden
        assert second is not None
        assert second.pid != first.pid
        assert second.poll() is None


def test_a_line_cut_short_is_not_a_group() -> None:
    """`+12` of `+1234` must never be signalled."""
    assert read_groups([b"+1234\n", b"+99\n", b"-99\n", b"+12"]) == {1234}
    assert read_groups([b"+\n", b"+x\n", b"\n"]) == set()


def test_a_process_that_never_gets_its_line_leaves() -> None:
    """Between fork and go stands a shell that ends when its supervisor does."""
    done = subprocess.run(
        ["/bin/sh", "-c", WAIT_FOR_GO, "sh", "echo", "ran"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")
