"""Real meshctl processes: a control plane that runs, and commands that ask it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

MESHCTL = (sys.executable, "-m", "meshlib.cli")


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user who has nothing: no configuration, no control plane of another test."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MESHLIB_", "MESHCTL_"))}
    homes = {"XDG_STATE_HOME": str(home / "state-home"), "XDG_CONFIG_HOME": str(home / "config-home")}
    return {**inherited, **homes, "HOME": str(home), "TERMINAL_WIDTH": "200", **more}


def meshctl(home: Path, *words: str, stdin: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*MESHCTL, *words), env=environment(home, **more), input=stdin, capture_output=True, text=True, timeout=60
    )


class ControlPlaneProcess:
    """admin: its URL as it says it. log: what it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.admin = self.xds = ""
        self._said = threading.Event()
        for stream in (process.stdout, process.stderr):
            threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: Iterator[str]) -> None:
        for line in stream:
            self.lines.append(line)
            if found := re.search(r"serving xDS on (\S+), the admin API on (\S+)", line):
                self.xds, self.admin = found.groups()
                self._said.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait(self) -> None:
        assert self._said.wait(60), self.log


@contextlib.contextmanager
def control_plane(home: Path, *words: str, **more: str) -> Iterator[ControlPlaneProcess]:
    """Runs until the block ends."""
    process = subprocess.Popen(
        (*MESHCTL, "control-plane", *words),
        env=environment(home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        made = ControlPlaneProcess(process)
        made.wait()
        yield made
    finally:
        process.terminate()
        process.wait(30)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
