"""Which commands are there? The list, in the order in which --help shows it, and how a command's failure is told."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from meshlib.cli import (
    access,
    analyze,
    apply,
    audit,
    authority,
    authz,
    bootstrap,
    breaker,
    config,
    control_plane,
    demo,
    describe,
    gateway,
    get,
    install,
    logs,
    look,
    run,
    status,
    tap,
    token,
    whoami,
)
from meshlib.cli.admin_client import CommandFailed
from meshlib.cli.connection import asking


class Commands(TyperGroup):
    """A command that can't do what was asked says so in one sentence on stderr, as kubectl does; no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CommandFailed as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except BrokenPipeError:  # `meshctl get | head -1`; main() sees to it that nothing more is written
            raise typer.Exit(1) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=Commands,
    name="meshctl",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A service mesh without sidecars: run it, configure it, look at it.",
)
app.command()(demo.demo)
app.command()(asking(apply.apply))
app.command()(asking(apply.delete))
app.command()(asking(get.get))
app.command()(asking(breaker.breaker))
app.command("status")(asking(status.proxy_status))
app.command("proxy-status", help="The same as status, by the name that istioctl gives it.")(asking(status.proxy_status))
app.command()(asking(status.problems))
app.command()(asking(config.config))
app.command()(asking(config.explain))
app.command()(asking(describe.describe))
app.command()(asking(look.dashboard))
app.command()(asking(look.stat))
app.command()(asking(look.edges))
app.command()(asking(look.traces))
app.command()(asking(tap.top))
app.command()(asking(tap.tap))
app.command()(asking(logs.logs))
app.command()(apply.validate)
app.command()(analyze.analyze)
app.command("control-plane")(control_plane.control_plane)
app.command()(gateway.gateway)
app.command()(install.install)
app.command()(install.uninstall)
app.command()(install.check)
# What follows the command's name is its own, options too.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run.run)
app.command()(asking(token.token))
app.command()(bootstrap.bootstrap)
app.command()(access.access)
app.command("identity")(asking(whoami.identity))
app.command()(asking(authz.authz))
app.command("ca")(asking(authority.ca))
app.command()(asking(audit.audit))
app.command()(asking(status.version))
