"""What do the commands that serve have in common? An address to bind, lines to log, and a signal that ends them."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Annotated, NamedTuple

import typer

from meshlib.cli.failure import CommandFailed

LogLevel = Annotated[
    str, typer.Option("--log-level", envvar="MESHLIB_LOG_LEVEL", help="debug, info, warning or error.")
]


class Address(NamedTuple):
    """port: 0 takes any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(option: str, text: str) -> Address:
    """`127.0.0.1:15010`, `[::1]:0`. CommandFailed, naming the option, for anything else."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise CommandFailed(f"{option} {text!r}: an address is HOST:PORT")
    return Address(host, int(port))


def log_to_stderr(level: str) -> None:
    """One line a record, with its time: what a container's log collector expects."""
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        raise CommandFailed(f"--log-level {level!r}: there are debug, info, warning and error")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    logging.getLogger("meshlib").setLevel(known[level.upper()])


async def until_signal() -> None:
    """Returns at the first SIGINT or SIGTERM; a second one has the system's own effect, so that nobody is stuck."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, asked.set)
    try:
        await asked.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
