"""How is the control plane run? meshctl control-plane: reads folders, serves xDS and the admin API until a signal."""

from __future__ import annotations

import asyncio
import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from meshlib.cli import running
from meshlib.cli.bookinfo import ADMIN_PORT, HOST, XDS_PORT
from meshlib.cli.failure import CommandFailed, told
from meshlib.cli.kubernetes import cluster_of
from meshlib.cli.options import prometheus
from meshlib.cli.serving import LogLevel, address, log_to_stderr, until_signal
from meshlib.model import is_loopback

if TYPE_CHECKING:
    from meshlib.controlplane.admission import Injection
    from meshlib.controlplane.authentication import Issuer, TokenReview
    from meshlib.controlplane.ca import PluggedAuthority
    from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
    from meshlib.kube.settings import KubeSettings

SHORTEST_TTL = 3
"""Seconds: it is renewed three times, and each costs every client an answer."""


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
    metrics: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Where /metrics, /healthz and /readyz are served for everybody, by plain HTTP."
        ),
    ] = "",
    kubernetes: Annotated[
        bool,
        typer.Option("--kubernetes", help="Follow the cluster of the kubeconfig, or the one this pod runs in."),
    ] = False,
    context: Annotated[str, typer.Option(metavar="NAME", help="The kubeconfig's context to use.")] = "",
    write_status: Annotated[
        bool, typer.Option("--write-status", help="Write what is wrong with the cluster's objects to their status.")
    ] = False,
    webhook: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where Kubernetes' admission webhooks are served, by TLS.")
    ] = "",
    inject_image: Annotated[
        str, typer.Option(metavar="IMAGE", help="The image whose Python prepares pods. Without it none is injected.")
    ] = "",
    inject_control_plane: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="How injected pods call this control plane.")
    ] = "",
    read_only: Annotated[
        bool,
        typer.Option("--read-only", help="Let nothing be applied through the admin API: objects are the cluster's."),
    ] = False,
    access: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Who may do what through the admin API. Needed off loopback."),
    ] = None,
    audit_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where every change is written; without it, audit.jsonl in --state."),
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option(
            help="Serve xDS and certificates by TLS, to callers who prove who they are. Default: unless on loopback."
        ),
    ] = None,
    san: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name or address by which this control plane is called. Repeatable."),
    ] = None,
    trust_domain: Annotated[
        str, typer.Option(envvar="MESHLIB_TRUST_DOMAIN", help="Of the identities that the CA gives.")
    ] = "cluster.local",
    ca_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="The CA's certificate, plugged in.")] = None,
    ca_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (mode 0600).")] = None,
    root_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="The root above it.")] = None,
    cert_chain: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What stands between the two, if anything does.")
    ] = None,
    ca_secret: Annotated[
        str,
        typer.Option(
            metavar="NAMESPACE/NAME", help="The cluster's Secret with the CA of all replicas; made where there is none."
        ),
    ] = "",
    token_secret: Annotated[
        str,
        typer.Option(
            metavar="NAMESPACE/NAME",
            help="The cluster's Secret with the join tokens of all replicas; made where there is none.",
        ),
    ] = "",
    jwt_issuer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ISSUER,AUDIENCE,JWKS",
            help="Whose tokens say which service account a process has; JWKS is a URL or a file. Repeatable.",
        ),
    ] = None,
    token_review: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="A Kubernetes API server that is asked about tokens; `in-cluster` for the one around us.",
        ),
    ] = "",
    token_audience: Annotated[str, typer.Option(help="The audience that Kubernetes' tokens must have.")] = "istio-ca",
    prometheus_url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Ask this Prometheus for the figures of graph and stat, rather than remember what is pushed.",
        ),
    ] = "",
    ttl: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE=SECONDS",
            help="Clients drop what is not renewed for so long (LDS, RDS, CDS, EDS). Repeatable. Default: never.",
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
        trust_domain=trust_domain,
        tls=tls,
        names=tuple(san or ()),
        plugged_ca=plugged(ca_cert, ca_key, root_cert, cert_chain),
        issuers=tuple(map(issuer, jwt_issuer or ())),
        kubernetes=review(token_review, token_audience) if token_review else None,
        access=access.resolve() if access else None,
        audit=audit_log.resolve() if audit_log else None,
        prometheus_url=prometheus(prometheus_url),
        metrics=address("--metrics", metrics) if metrics else None,
        is_read_only=read_only,
        ttls=dict(map(_ttl, ttl or ())),
    )
    if kubernetes or context:
        cluster = cluster_of(context)
        reviewer = settings.kubernetes or _reviewer(cluster, token_audience)
        settings = replace(settings, cluster=cluster, writes_status=write_status, kubernetes=reviewer)
    if ca_secret:
        settings = replace(settings, ca_secret=_secret("--ca-secret", ca_secret, settings))
        if settings.plugged_ca is not None:
            raise CommandFailed("--ca-secret and --ca-cert: one CA, please")
    if token_secret:
        settings = replace(settings, token_secret=_secret("--token-secret", token_secret, settings))
    if webhook:
        injection = _injection(inject_image, inject_control_plane, trust_domain, token_audience)
        settings = replace(settings, webhook=address("--webhook", webhook), injection=injection)
    elif inject_image:
        raise CommandFailed("--inject-image has no meaning without --webhook")
    try:
        plane = ControlPlane(settings)
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    asyncio.run(_serve(plane))


def plugged(
    certificate: Path | None, key: Path | None, root: Path | None, chain: Path | None
) -> PluggedAuthority | None:
    """The three that are needed, or none."""
    from meshlib.controlplane.ca import PluggedAuthority

    if certificate is None and key is None and root is None and chain is None:
        return None
    if certificate is None or key is None or root is None:
        raise CommandFailed("a CA is plugged in by --ca-cert, --ca-key and --root-cert together (and --cert-chain)")
    return PluggedAuthority(certificate.resolve(), key.resolve(), root.resolve(), chain.resolve() if chain else None)


def _ttl(text: str) -> tuple[str, float]:
    from meshlib.xds.resource_types import PUSH_ORDER, SHORT_NAMES

    name, _, seconds = text.partition("=")
    types = {SHORT_NAMES[type_url]: type_url for type_url in PUSH_ORDER}
    if name.upper() not in types or not seconds.isdecimal() or int(seconds) < SHORTEST_TTL:
        known = ", ".join(sorted(types))
        raise CommandFailed(f"--ttl {text!r}: is written TYPE=SECONDS; {known}; {SHORTEST_TTL} seconds at least")
    return types[name.upper()], float(seconds)


def _secret(option: str, text: str, settings: ControlPlaneSettings) -> tuple[str, str]:
    namespace, mark, name = text.partition("/")
    if not mark or not namespace or not name or "/" in name:
        raise CommandFailed(f"{option} {text!r}: is written NAMESPACE/NAME")
    if settings.cluster is None:
        raise CommandFailed(f"{option} needs --kubernetes: whose Secret is it?")
    return namespace, name


def issuer(text: str) -> Issuer:
    """`https://issuer.example,meshlib,https://issuer.example/keys`."""
    from meshlib.controlplane.authentication import Issuer

    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(parts):
        raise CommandFailed(f"--jwt-issuer {text!r}: is written ISSUER,AUDIENCE,JWKS")
    jwks = parts[2]
    if "://" not in jwks:
        if not Path(jwks).is_file():
            raise CommandFailed(f"--jwt-issuer {parts[0]}: {jwks} is neither a URL nor a file")
        jwks = str(Path(jwks).resolve())
    elif not jwks.startswith("https://") and not is_loopback(urlsplit(jwks).netloc):
        raise CommandFailed(f"--jwt-issuer {parts[0]}: keys are fetched by https only, but from this machine")
    return Issuer(parts[0], parts[1], jwks)


IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def review(url: str, audience: str) -> TokenReview:
    """Kubernetes gives every pod a token, and the root of its API server, in IN_CLUSTER."""
    from meshlib.controlplane.authentication import TokenReview

    token, ca = IN_CLUSTER / "token", IN_CLUSTER / "ca.crt"
    if url == "in-cluster":
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not token.exists():
            raise CommandFailed(
                "--token-review in-cluster: this is no pod: KUBERNETES_SERVICE_HOST or the token is missing"
            )
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    elif not url.startswith("https://") and not is_loopback(urlsplit(url).netloc):
        raise CommandFailed(f"--token-review {url!r}: tokens are sent by https only, but on this machine")
    return TokenReview(
        url.rstrip("/"), token if token.exists() else None, ca if ca.exists() else None, audience=audience
    )


def _injection(image: str, control_plane: str, trust_domain: str, audience: str) -> Injection | None:
    from meshlib.controlplane.admission import Injection

    if not image:
        return None
    if not control_plane:
        raise CommandFailed("--inject-image needs --inject-control-plane HOST:PORT: how do pods call this one?")
    return Injection(image, str(address("--inject-control-plane", control_plane)), trust_domain, audience)


def _reviewer(cluster: KubeSettings, audience: str) -> TokenReview | None:
    """Kubernetes' word on its pods' tokens, where we are a pod ourselves, with a token to ask it by."""
    from meshlib.controlplane.authentication import TokenReview

    if cluster.token_file is None or cluster.ca is None:
        return None
    return TokenReview(cluster.server, cluster.token_file, cluster.ca.file, audience=audience)


async def _serve(plane: ControlPlane) -> None:
    from meshlib.controlplane.sources import StateError

    # Of the objects of a large cluster nearly all stay, and none is a cycle: to look through them again and again, as
    # Python does after each few hundred new ones, took half of the time that a change needs.
    gc.set_threshold(50_000, 20, 20)
    try:
        await plane.start()
        gc.collect()
        gc.freeze()
    except (OSError, StateError) as error:
        await plane.stop()
        raise CommandFailed(told(error)) from None

    def announce() -> None:
        url = plane.local_admin_url
        roots = plane.roots if url.startswith("https:") else ""
        running.announce(running.Running(url, plane.xds_address, os.getpid(), roots))

    announce()
    if plane.authority is not None:
        plane.authority.on_change(announce)
    try:
        typer.echo(f"serving xDS on {plane.xds_address}, the admin API on {plane.admin_url}")
        await until_signal()
    finally:
        running.withdraw(os.getpid())
        await plane.stop()
