"""Which commands are there? The list, in the order in which --help shows it, and how a command's failure is told.

A command's module is imported when the command is typed: `meshctl get` does not wait for what a control plane needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from meshlib.cli.connection import asking
from meshlib.cli.failure import CommandFailed


class Entry(NamedTuple):
    """One command. where: module of meshlib.cli and function. asks: a control plane, so it has the options that say
    which, and by whom it is asked. options: Typer's."""

    where: str
    asks: bool = True
    options: Mapping[str, Any] = {}


COMMANDS: Mapping[str, Entry] = {
    "demo": Entry("demo:demo", asks=False),
    "apply": Entry("apply:apply"),
    "delete": Entry("apply:delete"),
    "get": Entry("get:get"),
    "breaker": Entry("breaker:breaker"),
    "status": Entry("status:proxy_status"),
    "proxy-status": Entry(
        "status:proxy_status", options={"help": "The same as status, by the name that istioctl gives it."}
    ),
    "problems": Entry("status:problems"),
    "config": Entry("config:config"),
    "explain": Entry("config:explain"),
    "describe": Entry("describe:describe"),
    "dashboard": Entry("look:dashboard"),
    "stat": Entry("look:stat"),
    "edges": Entry("look:edges"),
    "traces": Entry("look:traces"),
    "top": Entry("tap:top"),
    "tap": Entry("tap:tap"),
    "logs": Entry("logs:logs"),
    "validate": Entry("apply:validate", asks=False),
    "analyze": Entry("analyze:analyze", asks=False),
    "control-plane": Entry("control_plane:control_plane", asks=False),
    "gateway": Entry("gateway:gateway", asks=False),
    "install": Entry("install:install", asks=False),
    "uninstall": Entry("install:uninstall", asks=False),
    "check": Entry("install:check", asks=False),
    "run": Entry(  # what follows the command's name is its own, options too
        "run:run",
        asks=False,
        options={"context_settings": {"ignore_unknown_options": True, "allow_interspersed_args": False}},
    ),
    "token": Entry("token:token"),
    "bootstrap": Entry("bootstrap:bootstrap", asks=False),
    "access": Entry("access:access", asks=False),
    "identity": Entry("whoami:identity"),
    "authz": Entry("authz:authz"),
    "ca": Entry("authority:ca"),
    "audit": Entry("audit:audit"),
    "version": Entry("status:version"),
}

_STYLE: Mapping[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Loaded(Mapping[str, Any]):
    """click's commands by name, each made when it is looked at."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            entry = COMMANDS[name]
            module, _, function = entry.where.partition(":")
            does = getattr(import_module(f"meshlib.cli.{module}"), function)
            alone = typer.Typer(add_completion=False, **_STYLE)
            alone.command(name, **entry.options)(asking(does) if entry.asks else does)
            self._made[name] = get_command(alone)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """A command that can't do what was asked says so in one sentence on stderr, as kubectl does; no traceback."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands: Any = _Loaded()

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CommandFailed as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except BrokenPipeError:  # `meshctl get | head -1`; main() sees to it that nothing more is written
            raise typer.Exit(1) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    cls=Commands,
    name="meshctl",
    no_args_is_help=True,
    help="A service mesh without sidecars: run it, configure it, look at it.",
    **_STYLE,
)


@app.callback()
def _meshctl() -> None: ...
