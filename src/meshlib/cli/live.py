"""How does a table stay on the screen? It is drawn again every few seconds, in place on a terminal, until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import typer

EVERY = 2.0
"""Seconds between two looks."""
_CLEAR = "\x1b[H\x1b[J"


def again(watch: bool) -> Iterator[None]:
    """Once; with `watch`, until Ctrl-C."""
    yield
    try:
        while watch:
            time.sleep(EVERY)
            yield
    except KeyboardInterrupt:
        return


def show(text: str, watch: bool) -> None:
    typer.echo(_CLEAR + text if watch and sys.stdout.isatty() else text)
