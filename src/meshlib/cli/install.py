"""How does the control plane get into a cluster, and out of it? meshctl install, uninstall and check."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
import yaml

from meshlib.cli.failure import CommandFailed
from meshlib.cli.kubernetes import cluster_of
from meshlib.version import __version__

if TYPE_CHECKING:
    from meshlib.controlplane.installation import Installation
    from meshlib.kube.client import KubeClient, Object

Context = Annotated[str, typer.Option(metavar="NAME", help="The kubeconfig's context to use.")]
Home = Annotated[str, typer.Option("--namespace", "-n", help="Where the control plane runs.")]
HOME = "istio-system"
UNKNOWN_ROOT = "-----BEGIN CERTIFICATE-----\n(of the CA that the installation makes)\n-----END CERTIFICATE-----\n"


def install(
    namespace: Home = HOME,
    image: Annotated[
        str, typer.Option(help="Of the control plane, and of what pods are given.")
    ] = f"ghcr.io/meshlib/meshlib:{__version__}",
    replicas: Annotated[int, typer.Option(min=1, help="From two on with an autoscaler and a disruption budget.")] = 1,
    trust_domain: Annotated[str, typer.Option(help="Of the identities that the CA gives.")] = "cluster.local",
    inject: Annotated[
        bool,
        typer.Option(help="Put pods on the mesh, in namespaces labelled meshlib-injection=enabled."),
    ] = True,
    istio_crds: Annotated[
        bool, typer.Option("--istio-crds", help="Define Istio's kinds, too, where the cluster does not have them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the objects, and change nothing.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until the control plane runs as it was applied, five minutes at most.")
    ] = False,
    context: Context = "",
) -> None:
    """Install the control plane in a Kubernetes cluster, or bring it up to date. Again is harmless."""
    from meshlib.controlplane.installation import Installation, manifests

    wanted = Installation("", namespace, image, replicas, trust_domain, inject, istio_crds)
    if dry_run:
        _print(manifests(_with_root(wanted, UNKNOWN_ROOT)))
        return
    asyncio.run(_install(wanted, context, wait))


def uninstall(
    namespace: Home = HOME,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge", help="The CA and the kinds that install has defined too, with all objects of these kinds."
        ),
    ] = False,
    context: Context = "",
) -> None:
    """Take the control plane out of a cluster. Calls go on with what processes have; rules stay where they are."""
    asyncio.run(_uninstall(namespace, purge, context))


def check(namespace: Home = HOME, context: Context = "") -> None:
    """Is the control plane in this cluster as it should be? Exit code 1 if not."""
    failed = asyncio.run(_check(namespace, context))
    typer.echo(f"Status check results are {'×' if failed else '√'}")
    if failed:
        raise typer.Exit(1)


def _with_root(wanted: Installation, root: str) -> Installation:
    from dataclasses import replace

    return replace(wanted, root=root)


def _print(objects: Sequence[Object]) -> None:
    for each in objects:
        typer.echo("---\n" + yaml.dump(each, Dumper=_Plain, sort_keys=False, allow_unicode=True), nl=False)


class _Plain(yaml.SafeDumper):
    """What stands twice is written twice: people read it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@asynccontextmanager
async def _client(context: str) -> AsyncIterator[KubeClient]:
    """What the API server refuses is one sentence."""
    from meshlib.kube.client import KubeClient
    from meshlib.kube.errors import KubernetesError

    try:
        async with KubeClient(cluster_of(context)) as client:
            yield client
    except KubernetesError as error:
        raise CommandFailed(str(error)) from None


async def _install(wanted: Installation, context: str, wait: bool) -> None:
    from meshlib.cli.endings import ended
    from meshlib.cli.rollout import rolled_out
    from meshlib.controlplane.installation import MANAGER, NAME, manifests, path_of, unwanted

    async with _client(context) as client:
        namespace = manifests(_with_root(wanted, UNKNOWN_ROOT))[0]
        if await _find(client, path_of(namespace)) is None:
            await client.apply(path_of(namespace), namespace, manager=MANAGER)
        wanted = _with_root(wanted, await _root(client, wanted))
        for each in manifests(wanted):
            # Of a namespace nothing is ours but that it is there; Istio's own kind has a schema, which ours would take
            # away.
            if each["kind"] == "CustomResourceDefinition":
                await ended(client, (path_of(each),))
            is_kept = each["kind"] == "Namespace" or (_is_istios(each) and not await _is_ours(client, each))
            if is_kept and await _find(client, path_of(each)) is not None:
                continue
            await client.apply(path_of(each), each, manager=MANAGER)
            typer.echo(f"{_name(each)} applied")
        for each in unwanted(wanted):
            if await _find(client, path_of(each)) is not None:
                await client.delete(path_of(each))
                typer.echo(f"{_name(each)} deleted")
        if wait:
            await rolled_out(client, wanted.namespace, NAME)
    typer.echo(f"the control plane is installed in {wanted.namespace}; processes reach it at {wanted.host}:15012")


def _is_istios(given: Object) -> bool:
    return given["kind"] == "CustomResourceDefinition" and str(given["spec"]["group"]).endswith("istio.io")


async def _root(client: KubeClient, wanted: Installation) -> str:
    """The root of the CA that is there. One is made where there is none, and never replaced: all certificates of the
    mesh would be worth nothing."""
    from meshlib.controlplane.ca import CertificateAuthority
    from meshlib.controlplane.ca_secret import find_or_make
    from meshlib.controlplane.installation import secret

    made = secret(wanted, CertificateAuthority(wanted.trust_domain).exported())
    found, was_made = await find_or_make(client, made)
    if was_made:
        typer.echo(f"{_name(made)} made")
    try:
        return base64.b64decode(found["data"]["root-cert.pem"], validate=True).decode("ascii")
    except (KeyError, TypeError, ValueError):
        which = f"{wanted.namespace}/{made['metadata']['name']}"
        raise CommandFailed(
            f"the Secret {which} has no root-cert.pem: it is not a CA's; delete it, and install makes one, or put the "
            "CA's files into it"
        ) from None


def _is_available(deployment: Object) -> bool:
    from meshlib.cli.rollout import is_seen

    return is_seen(deployment) and int((deployment.get("status") or {}).get("availableReplicas") or 0) > 0


async def _uninstall(namespace: str, purge: bool, context: str) -> None:
    from meshlib.cli.endings import ended
    from meshlib.controlplane.installation import CA, KINDS, Installation, manifests, path_of
    from meshlib.controlplane.statuses import LEASE
    from meshlib.kube.lease import LEASES

    async with _client(context) as client:
        given = Installation(UNKNOWN_ROOT, namespace, replicas=2, injects=True, istio_crds=True)
        definitions: list[str] = []
        for each in reversed(manifests(given)):
            if each["kind"] == "Namespace":
                continue
            is_crd = each["kind"] == "CustomResourceDefinition"
            if is_crd and (not purge or (_is_istios(each) and not await _is_ours(client, each))):
                continue
            await client.delete(path_of(each))
            if is_crd:
                definitions.append(path_of(each))
            typer.echo(f"{_name(each)} deleted")
        # Made by the control plane, which may not make it again by now: its role is gone.
        await client.delete(LEASES.path("v1", namespace, LEASE))
        typer.echo(f"lease/{LEASE} deleted")
        if purge:
            await client.delete(KINDS["Secret"].path("v1", namespace, CA))
            typer.echo(f"secret/{CA} deleted")
            await ended(client, definitions)


async def _is_ours(client: KubeClient, wanted: Object) -> bool:
    """Whether install alone has said what this definition is: one that Istio has written to since is Istio's."""
    from meshlib.controlplane.installation import MANAGER, path_of

    found = await _find(client, path_of(wanted)) or {}
    fields: list[dict[str, Any]] = (found.get("metadata") or {}).get("managedFields") or []
    return {each.get("manager") for each in fields if "f:spec" in (each.get("fieldsV1") or {})} == {MANAGER}


def _name(given: Object) -> str:
    return f"{str(given['kind']).lower()}/{given['metadata']['name']}"


# check


class _Finding(NamedTuple):
    is_well: bool
    what: str
    hint: str = ""


async def _check(namespace: str, context: str) -> bool:
    failed = False
    async with _client(context) as client:
        async for each in _findings(client, namespace):
            failed |= not each.is_well
            typer.echo(f"{'√' if each.is_well else '×'} {each.what}")
            if not each.is_well and each.hint:
                typer.echo(f"    {each.hint}")
    return failed


async def _findings(client: KubeClient, namespace: str) -> AsyncIterator[_Finding]:
    from meshlib.controlplane.installation import CA, KINDS, Installation, manifests, path_of

    version = await client.get("/version")
    yield _Finding(True, f"the API server answers: {version.get('gitVersion', '')}")
    secret = await _find(client, KINDS["Secret"].path("v1", namespace, CA))
    yield _Finding(secret is not None, f"the CA is there: secret/{CA}", "meshctl install makes one")
    installed = Installation(UNKNOWN_ROOT, namespace)
    missing = []
    bundle = ((secret or {}).get("data") or {}).get("root-cert.pem")
    for each in manifests(installed):
        found = await _find(client, path_of(each))
        if found is None:
            missing.append(_name(each))
        elif each["kind"].endswith("WebhookConfiguration"):
            bundles = {webhook["clientConfig"].get("caBundle") for webhook in found.get("webhooks") or ()}
            yield _Finding(bundles == {bundle}, f"{_name(each)} trusts the CA", "meshctl install mends it")
        elif each["kind"] == "Deployment":
            hint = f"kubectl -n {namespace} logs deployment/{each['metadata']['name']} says what it waits for"
            yield _Finding(_is_available(found), f"{_name(each)} is available", hint)
    yield _Finding(not missing, "all objects are there", f"missing: {', '.join(missing)}; meshctl install brings them")


async def _find(client: KubeClient, path: str) -> dict[str, Any] | None:
    from meshlib.kube.errors import NotFound

    try:
        return await client.get(path)
    except NotFound:
        return None
