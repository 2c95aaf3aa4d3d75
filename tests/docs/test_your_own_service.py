"""Can a stranger put two services of their own on the mesh by the page alone? Its files and commands, as they stand.

A comment `terminal: NAME` says where the commands below it are typed. Only ports are others, and what installs is left
out: the tests' environment has it (tests/packaging installs the wheel).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT, Command, blocks, commands

from peers import unused_port

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PAGE = ROOT / "docs" / "tutorial" / "your-own-service.md"
INSTALLS = ("git clone ", "mkdir ", "python3 -m venv ", ". .venv/bin/activate", "pip install ")
PORTS = ("15010", "15014", "8000", "8001")
YOURS = "yours"
PATIENCE = 60.0
"""Seconds until something is there that the page shows."""


def files() -> dict[str, str]:
    """Each block of Python or YAML, by the file's name that begins the paragraph above it."""
    found = {}
    for block in (*blocks("python"), *blocks("yaml")):
        if block.page == PAGE:
            above = "".join(PAGE.read_text().splitlines(keepends=True)[: block.line - 1])
            found[re.findall(r"^`([\w./-]+)`", above, re.MULTILINE)[-1]] = block.text
    return found


def typed() -> dict[str, list[Command]]:
    """The commands of each terminal."""
    begins = [
        (number, match[1])
        for number, line in enumerate(PAGE.read_text().splitlines(), 1)
        if (match := re.fullmatch(r"<!-- terminal: (.+) -->", line))
    ]
    found: dict[str, list[Command]] = {name: [] for _, name in begins}
    for command in commands():
        if command.page != PAGE or command.text.startswith(INSTALLS):
            continue
        found[[name for line, name in begins if line < command.line][-1]].append(command)
    return found


class Desk:
    """The folder, and the terminals that are open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {port: str(unused_port()) for port in PORTS}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MESHLIB_", "MESHCTL_", "XDG_"))}
        self.environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}",
            "HOME": str(folder / "home"),
            "NO_PROXY": "*",
            "PYTHONUNBUFFERED": "1",
            "MESHLIB_TELEMETRY_INTERVAL": "1",  # the page lets its reader wait for ten
        }
        self.open: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """With the ports that are free on this machine."""
        text = re.sub(r":(\d+)\b", lambda match: f":{self.ports.get(match[1], match[1])}", text)
        text = re.sub(r"--port (\d+)", lambda match: f"--port {self.ports[match[1]]}", text)
        if text.startswith("meshctl control-plane "):
            text += f" --xds 127.0.0.1:{self.ports['15010']} --admin 127.0.0.1:{self.ports['15014']}"
        return text

    def start(self, name: str, to_type: list[Command]) -> None:
        """All commands in one shell; the last one is what runs there, until Ctrl-C."""
        *before, last = (self.here(each.text) for each in to_type)
        with self.log(name).open("wb") as log:
            self.open[name] = subprocess.Popen(
                ["bash", "-e", "-c", "\n".join((*before, f"exec {last}"))],
                cwd=self.folder, env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def await_shown(self, name: str, to_type: list[Command]) -> None:
        """All lines that the page shows there."""
        shown = [line for each in to_type for line in self.here(each.printed).splitlines()]
        deadline = time.monotonic() + PATIENCE
        while missing := [line for line in shown if anytime(line) not in anytime(self.log(name).read_text())]:
            assert self.open[name].poll() is None, self.log(name).read_text()
            assert time.monotonic() < deadline, (missing, self.log(name).read_text())
            time.sleep(0.05)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def run(self, command: str) -> str:
        ran = subprocess.run(
            ["bash", "-c", self.here(command)], cwd=self.folder, env=self.environment, timeout=120, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return ran.stdout

    def interrupt(self, name: str) -> None:
        """Ctrl-C, which everybody in that terminal gets."""
        os.killpg(self.open[name].pid, signal.SIGINT)

    def close(self) -> None:
        for process in self.open.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def anytime(text: str) -> str:
    """Without the date."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "home").mkdir()
    desk = Desk(tmp_path)
    for name, text in files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    yield desk
    desk.close()


def is_shown(command: Command, printed: str) -> bool:
    """Which of four calls fail is nobody's promise, how many is. Of edges: the columns, who calls whom, and how."""
    if command.text == "meshctl edges":
        header, *rows = (line.split() for line in command.printed.splitlines())
        seen = [line.split() for line in printed.splitlines()]
        return seen[0] == header and sorted(row[:5] for row in seen[1:]) == sorted(row[:5] for row in rows)
    return sorted(printed.splitlines()) == sorted(command.printed.splitlines())


def test_the_page_can_be_followed(desk: Desk) -> None:
    """Two services, retries, mTLS, and an end without a trace of an error."""
    terminals = typed()
    plane, *services, yours = terminals
    assert yours == YOURS
    for together in ([plane], services):
        for name in together:
            desk.start(name, terminals[name])
        for name in together:
            desk.await_shown(name, terminals[name])
    # Who types gets to the fourth terminal later: by then both are endpoints.
    deadline = time.monotonic() + PATIENCE
    while (status := desk.run("meshctl proxy-status")).count(" yes ") < 2:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    for command in terminals[YOURS]:
        deadline = time.monotonic() + PATIENCE
        while not is_shown(command, printed := desk.run(command.text)):
            assert not command.text.startswith("meshctl apply"), printed
            assert time.monotonic() < deadline, f"{command.id}\n{printed}"
            time.sleep(0.1)
    # Its terminal says who was refused, and that the requests of the shop still fail every other time.
    inventory = desk.log("inventory").read_text()
    assert "mTLS" in inventory or "plaintext" in inventory, inventory
    assert '"GET /stock/tea HTTP/1.1" 500' in inventory
    for name in services:
        desk.interrupt(name)
    for name in services:
        assert desk.open[name].wait(PATIENCE) in (0, -signal.SIGINT), name
    desk.interrupt(plane)
    assert desk.open[plane].wait(PATIENCE) == 0
    for name in (plane, *services):
        assert "Traceback" not in desk.log(name).read_text(), desk.log(name).read_text()
