"""How is the control plane run? meshctl control-plane: reads folders, serves xDS and the admin API until a signal."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshlib.cli import running
from meshlib.cli.admin_client import CommandFailed
from meshlib.cli.bookinfo import ADMIN_PORT, HOST, XDS_PORT
from meshlib.cli.kubernetes import cluster_of
from meshlib.cli.serving import LogLevel, address, log_to_stderr, until_signal

if TYPE_CHECKING:
    from meshlib.controlplane.authentication import TokenReview
    from meshlib.controlplane.server import ControlPlane
    from meshlib.kube.settings import KubeSettings


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
    kubernetes: Annotated[
        bool,
        typer.Option("--kubernetes", help="Follow the cluster of the kubeconfig, or the one this pod runs in."),
    ] = False,
    context: Annotated[str, typer.Option(metavar="NAME", help="The kubeconfig's context to use.")] = "",
    tls: Annotated[
        bool | None,
        typer.Option(
            help="Serve xDS and certificates by TLS, to callers who prove who they are. Default: unless on loopback."
        ),
    ] = None,
    log_level: LogLevel = "info",
) -> None:
    """Tell the mesh what to do: serve xDS, from folders of YAML, Kubernetes, and what is applied. Until Ctrl-C."""
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
        tls=tls,
    )
    if kubernetes or context:
        cluster = cluster_of(context)
        settings = replace(settings, cluster=cluster, kubernetes=_reviewer(cluster))
    asyncio.run(_serve(ControlPlane(settings)))


def _reviewer(cluster: KubeSettings) -> TokenReview | None:
    """Kubernetes' word on its pods' tokens, where we are a pod ourselves, with a token to ask it by."""
    from meshlib.controlplane.authentication import TokenReview

    if cluster.token_file is None or cluster.ca is None:
        return None
    return TokenReview(cluster.server, cluster.token_file, cluster.ca.file)


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
