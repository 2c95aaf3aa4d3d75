"""How is the control plane run? meshctl control-plane: reads folders, serves xDS and the admin API until a signal."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshlib.cli import running
from meshlib.cli.admin_client import CommandFailed
from meshlib.cli.bookinfo import ADMIN_PORT, HOST, XDS_PORT
from meshlib.cli.serving import LogLevel, address, log_to_stderr, until_signal

if TYPE_CHECKING:
    from meshlib.controlplane.server import ControlPlane


def control_plane(
    config: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE|FOLDER]...", help="YAML to read and to watch. Without any: only what is applied."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what is applied here. Without it, it ends with the process."),
    ] = None,
    xds: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where xDS is served.")] = f"{HOST}:{XDS_PORT}",
    admin: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the admin API is served.")
    ] = f"{HOST}:{ADMIN_PORT}",
    log_level: LogLevel = "info",
) -> None:
    """Tell the mesh what to do: serve xDS, from folders of YAML and from what is applied. Until Ctrl-C."""
    # Here, since the other commands need none of it and should answer at once.
    from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings

    log_to_stderr(log_level)
    folders = tuple(config or ())
    for path in folders:
        if not path.exists():
            raise CommandFailed(f"the path {str(path)!r} does not exist")
    settings = ControlPlaneSettings(
        folders=tuple(path.resolve() for path in folders),
        state=state.resolve() if state else None,
        xds=address("--xds", xds),
        admin=address("--admin", admin),
    )
    asyncio.run(_serve(ControlPlane(settings)))


async def _serve(plane: ControlPlane) -> None:
    from meshlib.controlplane.sources import StateError

    try:
        await plane.start()
    except (OSError, StateError) as error:
        await plane.stop()
        raise CommandFailed(getattr(error, "strerror", None) or str(error)) from None
    running.announce(running.Running(plane.admin_url, plane.xds_address, os.getpid()))
    try:
        typer.echo(f"serving xDS on {plane.xds_address}, the admin API on {plane.admin_url}")
        await until_signal()
    finally:
        running.withdraw(os.getpid())
        await plane.stop()
