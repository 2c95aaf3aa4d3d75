"""Who am I, until when, and whom does the mesh trust? meshctl identity: at the control plane, or as a process."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import age
from meshlib.controlplane.admin_api import Authority, WhoAmI

if TYPE_CHECKING:
    from meshlib.identity.credentials import Credentials


def identity(
    workload: Annotated[
        bool, typer.Option("--workload", help="Who a process in this environment is (MESHLIB_IDENTITY).")
    ] = False,
    output: Annotated[str, typer.Option("--output", "-o", help="json.")] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """Who am I, until when, and whom does the mesh trust?

    At the control plane: the name, the roles, and the roots. With --workload: the certificate that a process gets with
    the MESHLIB_ settings of this environment; a join token is not spent for it.
    """
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    if workload:
        _show_workload(output)
        return
    with AdminClient(control_plane) as client:
        me = client.get("/v1/whoami", {}, WhoAmI)
        trusted = client.get("/v1/ca", {}, Authority) if me.roles else None
    if output:
        told = {"whoami": msgspec.to_builtins(me), "ca": msgspec.to_builtins(trusted)}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo("\n".join(_lines(me, trusted)))


def _lines(me: WhoAmI, trusted: Authority | None) -> Iterator[str]:
    yield f"name:          {me.name}"
    yield f"known by:      {'nothing: this control plane asks nobody' if me.access == 'open' else me.method}"
    yield f"until:         {_when(me.until) if me.until else 'it is taken back'}"
    held = [f"{each.role} in {_places(each.namespaces)}" for each in me.roles]
    yield f"roles:         {'; '.join(held) or 'none'}"
    if trusted is not None:
        yield f"trust domain:  {trusted.trust_domain}"
        for root in trusted.roots:
            yield f"root:          {root.fingerprint} ({root.state}, until {_when(root.ends)})"


def _show_workload(output: str) -> None:
    credentials = _credentials()
    bundles = {
        domain: [hashlib.sha256(der).hexdigest() for der in _certificates(bundle)]
        for domain, bundle in credentials.trust_bundles
    }
    if output:
        told = {
            "identity": credentials.identity.uri,
            "not_before": credentials.not_before,
            "not_after": credentials.not_after,
            "trust_bundles": bundles,
        }
        typer.echo(json.dumps(told, indent=2))
        return
    now = time.time()
    left = f"{age(credentials.not_after - now)} left" if now < credentials.not_after else "expired"
    typer.echo(f"identity:      {credentials.identity.uri}")
    typer.echo(f"since:         {_when(credentials.not_before)}")
    typer.echo(f"until:         {_when(credentials.not_after)} ({left})")
    for domain, roots in bundles.items():
        for root in roots:
            typer.echo(f"trusts:        {domain} by root {root}")


def _credentials() -> Credentials:
    import meshlib
    from meshlib.errors import MeshError
    from meshlib.identity.access import JOIN_PREFIX
    from meshlib.settings import Settings

    try:
        settings = Settings.from_environment(os.environ)
    except MeshError as error:
        raise CommandFailed(str(error)) from None
    if not settings.identity:
        raise CommandFailed("a process in this environment has no identity: set MESHLIB_IDENTITY, as to control-plane")
    if settings.identity.startswith("files:"):
        return _of_files(Path(settings.identity.partition(":")[2]))
    try:
        token = Path(settings.token_file).read_text() if settings.token_file else ""
    except OSError as error:
        raise CommandFailed(f"MESHLIB_TOKEN_FILE {settings.token_file}: {error.strerror}") from None
    if token.startswith(JOIN_PREFIX):
        raise CommandFailed("MESHLIB_TOKEN_FILE holds a join token, which is good once: to look would spend it")
    try:
        with meshlib.connect(cache_dir="-", telemetry="off") as mesh:
            found = mesh.wait_for_credentials()
    except MeshError as error:
        raise CommandFailed(str(error)) from None
    if found is None:
        raise CommandFailed(
            f"{settings.identity} gave no certificate within {settings.identity_timeout:g} s: can it be reached, and "
            "does MESHLIB_TOKEN_FILE hold a token that it takes?"
        )
    return found


def _of_files(folder: Path) -> Credentials:
    from meshlib.identity.files import CERTIFICATE, KEY, ROOTS
    from meshlib.identity.pem import BadCredentials, credentials_of

    try:
        chain, key, roots = ((folder / name).read_bytes() for name in (CERTIFICATE, KEY, ROOTS))
        return credentials_of(chain, key, roots)
    except OSError as error:
        raise CommandFailed(f"{error.filename}: {error.strerror}") from None
    except BadCredentials as error:
        raise CommandFailed(f"{folder}: {error}") from None


def _certificates(bundle: bytes) -> Iterable[bytes]:
    end = "-----END CERTIFICATE-----"
    for part in bundle.decode("ascii").split(end)[:-1]:
        yield ssl.PEM_cert_to_DER_cert(part.strip() + f"\n{end}\n")


def _places(namespaces: Iterable[str]) -> str:
    return ", ".join("all namespaces" if each == "*" else each for each in namespaces)


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
