"""How does a client that is not ours join the mesh? meshctl bootstrap: the file that gRPC or an Envoy starts from, and
what keeps its certificate fresh."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshlib.cli import running
from meshlib.cli.bookinfo import HOST, XDS_PORT
from meshlib.cli.failure import CommandFailed, told
from meshlib.cli.serving import Address, LogLevel, address, log_to_stderr, until_signal
from meshlib.errors import SettingsError

if TYPE_CHECKING:
    from meshlib.identity.credentials import Credentials
    from meshlib.model import Node
    from meshlib.settings import Settings
    from meshlib.xds.bootstrap import ControlPlaneAddress


def bootstrap(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the file here (mode 0600), not to the terminal.")
    ] = None,
    envoy: Annotated[bool, typer.Option("--envoy", help="For an Envoy beside a service, not for gRPC.")] = False,
    gateway: Annotated[bool, typer.Option("--gateway", help="For an Envoy that lets traffic in.")] = False,
    certificates: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the mesh's certificate is: tls.crt, tls.key and ca.crt.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep DIR fresh, and relay to the control plane, until Ctrl-C.")
    ] = False,
    control_plane: Annotated[
        str,
        typer.Option(
            envvar="MESHLIB_CONTROL_PLANE",
            metavar="HOST:PORT",
            help="The control plane's xDS address. Without it: the one running on this machine.",
        ),
    ] = "",
    service: Annotated[
        str,
        typer.Option(envvar="MESHLIB_SERVICE", help="The service that is served, if any; MESHLIB_ADDRESS is where."),
    ] = "",
    inbound: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PORT=HOST:PORT", help="Envoy: take calls on PORT for what serves at HOST:PORT. Repeatable."
        ),
    ] = None,
    outbound: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Envoy: where the service sends its own calls.")
    ] = "127.0.0.1:15001",
    admin: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Envoy: where its own admin interface is served.")
    ] = "127.0.0.1:15000",
    log_level: LogLevel = "info",
) -> None:
    """Write what gRPC's own xDS (GRPC_XDS_BOOTSTRAP) or an Envoy needs to join. Who it is comes from MESHLIB_*."""
    from meshlib.settings import Settings

    announced = None if control_plane else running.find()
    target = control_plane or (announced.xds if announced else f"{HOST}:{XDS_PORT}")
    given = {"MESHLIB_CONTROL_PLANE": target, "MESHLIB_SERVICE": service}
    try:
        settings = Settings.from_environment({**os.environ, **{name: value for name, value in given.items() if value}})
    except SettingsError as error:
        raise CommandFailed(str(error)) from None
    address("--control-plane", target)
    if watch and certificates is None:
        raise CommandFailed("--watch keeps a folder fresh: say which with --certificates DIR")
    plan = _Plan(
        envoy or gateway,
        gateway,
        _ports(inbound or ()),
        _numeric("--outbound", outbound),
        address("--admin", admin),
        certificates,
    )
    try:
        if not watch:
            _write(plan.file(settings, _direct(settings, plan.is_envoy)), output)
        else:
            log_to_stderr(log_level)
            asyncio.run(_keep(plan, settings, output))
    except (OSError, SettingsError) as error:
        raise CommandFailed(told(error)) from None


class _Plan:
    """What was asked for on the command line."""

    def __init__(
        self,
        is_envoy: bool,
        is_gateway: bool,
        inbound: tuple[tuple[int, str], ...],
        outbound: str,
        admin: Address,
        certificates: Path | None,
    ) -> None:
        self.is_envoy, self._is_gateway, self._admin = is_envoy, is_gateway, admin
        self._inbound, self._outbound = inbound, outbound
        self.certificates = certificates.resolve() if certificates is not None else None

    def file(self, settings: Settings, server: ControlPlaneAddress) -> dict[str, Any]:
        from meshlib.xds.bootstrap import envoy_bootstrap, grpc_bootstrap

        folder = str(self.certificates) if self.certificates is not None else ""
        node = self._node(settings, folder)
        if self.is_envoy:
            return envoy_bootstrap(node, server, self._admin)
        return grpc_bootstrap(node, server, folder)

    def _node(self, settings: Settings, folder: str) -> Node:
        from meshlib.model import TLS_MODE, NodeKind

        node = settings.node(NodeKind.ROUTER if self._is_gateway else NodeKind.SIDECAR)
        workload = node.workload
        if workload.port and folder and not self._is_gateway:
            # Callers learn by it that the port takes mutual TLS.
            labels = {**dict(workload.labels), TLS_MODE: "istio"}
            workload = replace(workload, labels=tuple(sorted(labels.items())))
        node = replace(node, workload=workload, ready=bool(workload.port), user_agent="", takes_ttl=False)
        if not self.is_envoy:
            from meshlib.xds.encode_tls import PROVIDER

            return replace(node, certificates=PROVIDER if folder else "")
        if self._is_gateway:
            return replace(node, certificates=folder, ready=False)
        if workload.port and workload.port not in dict(self._inbound):
            raise CommandFailed(
                f"for whom does the Envoy take calls on {workload.port}, MESHLIB_ADDRESS's port? "
                f"--inbound {workload.port}=HOST:PORT"
            )
        return replace(node, certificates=folder, inbound=self._inbound, outbound=self._outbound)


def _ports(pairs: Iterable[str]) -> tuple[tuple[int, str], ...]:
    found: dict[int, str] = {}
    for pair in pairs:
        port, _, where = pair.partition("=")
        if not (port.isdecimal() and 0 < int(port) < 65536 and ":" in where):
            raise CommandFailed(f"--inbound {pair!r}: write PORT=HOST:PORT, as 9080=127.0.0.1:8080")
        found[int(port)] = _numeric("--inbound", where)
    return tuple(sorted(found.items()))


def _numeric(option: str, text: str) -> str:
    """An Envoy binds and calls IP addresses here; `localhost` is one by another name."""
    host, port = address(option, text)
    host = "127.0.0.1" if host == "localhost" else host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise CommandFailed(f"{option} {text!r}: give an IP address and a port") from None
    return str(Address(host, port))


def _direct(settings: Settings, is_envoy: bool) -> ControlPlaneAddress:
    """Without a relay. A token has to be one that may be shown again and again."""
    from meshlib.identity.access import JOIN_PREFIX
    from meshlib.model import is_loopback
    from meshlib.xds.bootstrap import ControlPlaneAddress

    target, roots, token = settings.control_plane, settings.ca_roots, settings.token_file
    if not roots and not is_loopback(target):
        raise CommandFailed(
            f"control plane {target}: plaintext is for this machine only; give its root in MESHLIB_CA_ROOTS, or --watch"
        )
    if token and (is_envoy or Path(token).read_text().startswith(JOIN_PREFIX)):
        raise CommandFailed(
            "a token that is good once, and any token for an Envoy, need a relay: --certificates DIR --watch"
        )
    return ControlPlaneAddress(target, roots, token)


def _write(file: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(file, indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    draft = output.with_name(f".{output.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    draft.replace(output)


async def _keep(plan: _Plan, settings: Settings, output: Path | None) -> None:
    """The certificate first, then the relay, and last the file: who finds it finds everything."""
    from meshlib.identity.choice import access_to, credentials_source
    from meshlib.identity.folder import read_credentials, write_credentials
    from meshlib.identity.holder import IdentityHolder
    from meshlib.identity.relay import Relay
    from meshlib.xds.bootstrap import ControlPlaneAddress

    folder = plan.certificates
    assert folder is not None

    def reach(target: str) -> Any:
        return access_to(target, settings.ca_roots, settings.token_file, lambda: holder.credentials)

    source = settings.identity or "control-plane"
    # A join token is good once: after a restart the certificate that is still there is what proves who we are.
    holder = IdentityHolder(
        lambda _: credentials_source(source, reach, settings.control_plane),
        read_credentials(folder, time.time()),
    )
    is_written = threading.Event()

    def write(credentials: Credentials) -> None:
        write_credentials(folder, credentials)
        is_written.set()

    holder.on_rotation(write)
    with ExitStack() as stack:
        stack.callback(holder.stop)
        stack.callback(is_written.set)
        holder.start()
        asked = asyncio.ensure_future(until_signal())
        waiting = asyncio.ensure_future(asyncio.to_thread(is_written.wait, settings.identity_timeout))
        await asyncio.wait((asked, waiting), return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return
        if not waiting.result():
            asked.cancel()
            raise CommandFailed(
                f"no certificate from {source} within {settings.identity_timeout:g} s: the log says why; "
                "MESHLIB_TOKEN_FILE holds the proof of who this is (meshctl token create)"
            )
        relay = Relay(reach(settings.control_plane), folder)
        relay.start()
        stack.callback(relay.stop)
        _write(plan.file(settings, ControlPlaneAddress(relay.target)), output)
        if output is not None:
            typer.echo(f"{output}: written; {folder} is kept fresh", err=True)
        await asked
