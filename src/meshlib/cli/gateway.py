"""How does traffic from outside get in? meshctl gateway: an ingress proxy, configured by Gateway and VirtualService."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshlib.cli import running
from meshlib.cli.bookinfo import HOST, XDS_PORT
from meshlib.cli.failure import CommandFailed
from meshlib.cli.serving import LogLevel, log_to_stderr, until_signal
from meshlib.errors import SettingsError

if TYPE_CHECKING:
    from meshlib.gateway.server import Gateway
    from meshlib.kube.settings import KubeSettings

KUBERNETES = "kubernetes:"


def gateway(
    control_plane: Annotated[
        str,
        typer.Option(
            envvar="MESHLIB_CONTROL_PLANE",
            metavar="HOST:PORT|FOLDER",
            help="The control plane's xDS address, or a folder of YAML. Without it: the one running on this machine.",
        ),
    ] = "",
    labels: Annotated[
        str, typer.Option(metavar="KEY=VALUE,...", help="What the selectors of Gateway objects must fit.")
    ] = "istio=ingressgateway",
    name: Annotated[str, typer.Option(help="The workload's name.")] = "istio-ingressgateway",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="The workload's namespace.")] = "istio-system",
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 for the world.")] = HOST,
    port: Annotated[
        list[str] | None,
        typer.Option(metavar="PORT=LOCAL", help="Listen on LOCAL where a Gateway says PORT. Repeatable."),
    ] = None,
    trusted_hops: Annotated[
        int,
        typer.Option(min=0, help="How many proxies of yours stand in front; what they say of the client is believed."),
    ] = 0,
    credentials: Annotated[
        str,
        typer.Option(
            metavar="DIR|kubernetes:",
            help="Where credentialName is found: a folder for each Secret, or YAML; or Kubernetes' Secrets in "
            "--namespace. Default: the mesh's folder.",
        ),
    ] = "",
    max_body: Annotated[
        int, typer.Option(min=0, metavar="BYTES", help="Refuse larger request bodies with 413; 0 for no limit.")
    ] = 0,
    log_level: LogLevel = "info",
) -> None:
    """Let traffic in: serve what Gateway and VirtualService objects say. Until Ctrl-C."""
    # Here, since the other commands need none of it and should answer at once.
    from meshlib.gateway.limits import Limits
    from meshlib.gateway.server import Gateway
    from meshlib.mesh import Mesh
    from meshlib.model import NodeKind
    from meshlib.settings import Settings

    log_to_stderr(log_level)
    announced = None if control_plane else running.find()
    try:
        settings = replace(
            Settings.from_environment({**os.environ, "MESHLIB_LABELS": labels}),
            control_plane=control_plane or (announced.xds if announced else f"{HOST}:{XDS_PORT}"),
            workload=name,
            namespace=namespace,
        )
    except SettingsError as error:
        raise CommandFailed(str(error)) from None
    ports = dict(_two_ports(pair) for pair in port or ())
    with Mesh(settings, kind=NodeKind.ROUTER) as mesh:
        limits = Limits(body=max_body or None)
        serving = Gateway(
            mesh,
            bind=bind,
            ports=ports,
            limits=limits,
            trusted_hops=trusted_hops,
            credentials=_credentials(credentials),
        )
        asyncio.run(_serve(serving))


def _credentials(given: str) -> Path | KubeSettings | None:
    if given != KUBERNETES:
        return Path(given) if given else None
    from meshlib.kube.errors import InvalidSettings
    from meshlib.kube.settings import find_settings

    try:
        return find_settings()
    except InvalidSettings as error:
        raise CommandFailed(f"--credentials {KUBERNETES} {error}") from None


def _two_ports(pair: str) -> tuple[int, int]:
    wanted, _, local = pair.partition("=")
    if not (wanted.isdecimal() and local.isdecimal() and 0 < int(wanted) < 65536 and int(local) < 65536):
        raise CommandFailed(f"--port {pair!r}: write PORT=LOCAL, as 443=8443")
    return int(wanted), int(local)


async def _serve(serving: Gateway) -> None:
    """Until a signal, or until the gateway itself fails."""
    run = asyncio.ensure_future(serving.run())
    asked = asyncio.ensure_future(until_signal())
    try:
        await asyncio.wait({run, asked}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        asked.cancel()
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
