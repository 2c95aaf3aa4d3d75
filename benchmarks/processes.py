"""Which processes take part? Servers and control planes that are started for a measurement, and what they use."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from meshlib.cli.ports import free_port

PATIENCE = 30.0
"""Seconds for a process to serve."""


def cpu_seconds(processes: Sequence[int]) -> float:
    """User and system time of processes and of those that they started; 0.0 where there is no Linux. In nanoseconds, of
    threads that have ended, too: the ticks of /proc/PID/stat are as long as ten calls."""
    return sum(_clock(process) + cpu_seconds(_children(process)) for process in processes)


def _clock(process: int) -> float:
    """By the clock that clock_getcpuclockid(3) names."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0


def _children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found


class Server(NamedTuple):
    """process: its id. ports: what it printed on its first line."""

    process: int
    ports: tuple[int, ...]


@contextmanager
def module(name: str, *arguments: str) -> Iterator[Server]:
    """`python -m name`, which prints its ports and ends with its stdin."""
    command = [sys.executable, "-m", name, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        ports = process.stdout.readline().split()
        if not ports:
            raise RuntimeError(f"{' '.join(command)} ended with {process.wait()} before it served")
        try:
            yield Server(process.pid, tuple(map(int, ports)))
        finally:
            process.stdin.close()
            process.wait(PATIENCE)


@contextmanager
def program(command: Sequence[str], port: int, log: Path, **environment: str) -> Iterator[Server]:
    """A program that serves on `port` until it is terminated. What it says goes to `log`, and into the error if it does
    not serve."""
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env={**os.environ, **environment}
        ) as process,
    ):
        try:
            await_port(port, process, log)
            yield Server(process.pid, (port,))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{process.args!r} does not serve on port {port}: {said}") from None
            time.sleep(0.02)


def ports(count: int) -> list[int]:
    """That are free, and differ."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port(0, found))
    return list(found)


class ControlPlane(NamedTuple):
    process: int
    xds: str
    admin: str


@contextmanager
def control_plane(folder: Path, log: Path) -> Iterator[ControlPlane]:
    """Of the YAML in `folder`. xds: its address. admin: the URL of its admin API."""
    xds, admin = ports(2)
    command = [sys.executable, "-m", "meshlib.cli", "control-plane", str(folder), "--log-level", "error"]
    addresses = ["--xds", f"127.0.0.1:{xds}", "--admin", f"127.0.0.1:{admin}"]
    with program([*command, *addresses], admin, log) as server:
        yield ControlPlane(server.process, f"127.0.0.1:{xds}", f"http://127.0.0.1:{admin}")
