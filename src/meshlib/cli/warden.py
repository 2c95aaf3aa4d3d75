"""Who ends the processes when the one that started them was killed? This program, which does nothing else.

It is a process of its own, run as `python -I -S warden.py GRACE`, and reads from the supervisor's pipe which process
groups live: `+4711` and `-4711`, one a line. The kernel closes the pipe when the supervisor ends, in whatever way
(SIGKILL too); then every group that is still listed gets SIGTERM, and SIGKILL after GRACE seconds. Unlike Linux's
PR_SET_PDEATHSIG this works on macOS, reaches grandchildren (the workers of a forking server), and does not depend on
which thread had started the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

POLL = 0.05
"""Seconds. Whether a group that is not ours to wait for is empty can only be asked again and again."""


def read_groups(lines: list[bytes]) -> set[int]:
    """The groups that are alive after these lines. A line cut short by the supervisor's death counts as not said."""
    alive: set[int] = set()
    for line in lines:
        if not line.endswith(b"\n") or not line[1:].strip().isdigit():
            continue
        group = int(line[1:])
        if line.startswith(b"+"):
            alive.add(group)
        else:
            alive.discard(group)
    return alive


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says this of a group whose members are all zombies
        return False
    return True


def end(groups: set[int], grace: float) -> None:
    """SIGTERM to every group, SIGKILL to those that are there after `grace` seconds."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(map(is_alive, groups)) and time.monotonic() < deadline:
        time.sleep(POLL)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C is the supervisor's to handle; we outlive it
    alive: set[int] = set()
    for line in sys.stdin.buffer:
        alive = read_groups([*(b"+%d\n" % group for group in alive), line])
    end(alive, float(sys.argv[1]))


if __name__ == "__main__":
    main()
