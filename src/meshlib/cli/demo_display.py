"""What does the person in front of the demo see? A live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

STYLES = {"up": "green", "starting": "cyan", "waiting": "dim", "down": "red"}


class Display:
    """States of the parts while they come up; afterwards lines as things happen, and one live line at the bottom.

    On a terminal the table and the line are redrawn in place. Elsewhere every change is one line, at once.
    """

    def __init__(self, console: Console, parts: Sequence[str]) -> None:
        self._console = console
        self._states = dict.fromkeys(parts, "waiting")
        self._began = time.monotonic()
        self._live: Live | None = None
        self._bottom: Callable[[], str] = lambda: ""
        self._settled = False
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=8, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def state(self, part: str, state: str, note: str = "") -> None:
        """`part` is now waiting, starting, up or down."""
        self._states[part] = state
        if self._live is None or self._settled:
            self.say(f"{part} is {state}{f': {note}' if note else ''}")

    def say(self, text: str = "", style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    def settle(self) -> None:
        """All is up: the table stays as it is, and the live line begins."""
        if self._live is not None and not self._settled:
            self._settled = True
            table = self._table()
            self._live.refresh()
            self._console.print(table)
        self._settled = True

    def bottom(self, line: Callable[[], str]) -> None:
        """What the live line shows, asked at each redraw."""
        self._bottom = line

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def _render(self) -> RenderableType:
        if not self._settled:
            seconds = time.monotonic() - self._began
            return Group(self._table(), Text(f"{seconds:.0f} s", "dim"))
        return Text(self._bottom(), "bold")

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for part, state in self._states.items():
            mark: RenderableType = (
                self._spinner if state == "starting" else Text("✓" if state == "up" else "·", STYLES[state])
            )
            table.add_row(mark, part, Text(state, STYLES[state]))
        return table
