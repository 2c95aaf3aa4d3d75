"""Does a Deployment run as it was applied, and if not, why? What `kubectl rollout status` waits for, with what pods say
of their containers: that an image is not there, or what a program said before it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from meshlib.cli.endings import is_ending
from meshlib.cli.failure import CommandFailed
from meshlib.kube.client import Resource
from meshlib.kube.errors import Forbidden

if TYPE_CHECKING:
    from meshlib.kube.client import KubeClient, Object

PATIENCE = 300.0
"""Seconds for a Deployment to be rolled out."""
LOOK = 1.0
"""Seconds between two looks."""
_DEPLOYMENTS, _PODS = Resource("Deployment", "deployments", "apps"), Resource("Pod", "pods")
_USUAL = frozenset({"", "ContainerCreating", "PodInitializing"})
"""Reasons for which a container waits that is only about to begin."""


async def rolled_out(client: KubeClient, namespace: str, name: str) -> None:
    """Wait until all pods of it are of its present template, and available. What is in the way is told on stderr, once.
    Raises CommandFailed after PATIENCE, with what is in the way, and KubernetesError."""
    loop = asyncio.get_running_loop()
    deadline, told = loop.time() + PATIENCE, ""
    while not is_rolled_out(deployment := await client.get(_DEPLOYMENTS.path("v1", namespace, name))):
        reason = "; ".join(obstacles(deployment, await _pods(client, namespace, deployment)))
        if loop.time() > deadline:
            hint = reason or f"kubectl -n {namespace} logs deployment/{name} says what it waits for"
            raise CommandFailed(f"the Deployment {namespace}/{name} is not available after {PATIENCE:g} s: {hint}")
        if reason and reason != told:
            typer.echo(f"waiting for deployment/{name}: {reason}", err=True)
            told = reason
        await asyncio.sleep(LOOK)


def is_rolled_out(deployment: Object) -> bool:
    """Not while a pod of an earlier template is there: it may be the only one that serves."""
    status = deployment.get("status") or {}
    replicas, updated = _count(status, "replicas"), _count(status, "updatedReplicas")
    available = _count(status, "availableReplicas")
    wanted = int((deployment.get("spec") or {}).get("replicas", 1))
    return is_seen(deployment) and wanted <= updated == replicas and updated <= available and available > 0


def is_seen(deployment: Object) -> bool:
    """Whether its status is about what was applied last."""
    return _count(deployment.get("status") or {}, "observedGeneration") >= _count(deployment["metadata"], "generation")


def obstacles(deployment: Object, pods: Sequence[Object]) -> Iterator[str]:
    """What does not go away by itself, as the Deployment and its pods say it; not what is only about to begin."""
    for each in (deployment.get("status") or {}).get("conditions") or ():
        if each.get("type") == "ReplicaFailure" and each.get("status") == "True":
            yield str(each.get("message") or each.get("reason"))
    for pod in pods:
        if is_ending(pod):
            continue
        status, name = pod.get("status") or {}, pod["metadata"]["name"]
        for each in status.get("conditions") or ():
            if each.get("type") == "PodScheduled" and each.get("status") == "False":
                yield f"pod {name}: {each.get('message') or each.get('reason')}"
        for each in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
            if reason := _reason(each):
                yield f"pod {name}, container {each['name']}: {reason}"


def _reason(container: Mapping[str, Any]) -> str:
    """Why this container does not run, or has not run on; "" if there is nothing to say."""
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    if container.get("ready") or (ended.get("exitCode") == 0 and not waiting):
        return ""
    reason = str(waiting.get("reason") or "")
    found = [] if reason in _USUAL else [reason]
    if ended:
        found.append(f"ended with exit code {ended.get('exitCode')}{_last_words(str(ended.get('message') or ''))}")
    elif found and waiting.get("message"):
        found.append(str(waiting["message"]))
    return ": ".join(found)


def _last_words(log: str) -> str:
    lines = [each.strip() for each in log.splitlines() if each.strip()]
    return f" after it said: {lines[-1]}" if lines else ""


def _count(given: Mapping[str, Any], name: str) -> int:
    return int(given.get(name) or 0)


async def _pods(client: KubeClient, namespace: str, deployment: Object) -> Sequence[Object]:
    """None where one may install, and not read pods."""
    labels = deployment["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    try:
        return (await client.list(_PODS.path("v1", namespace), labelSelector=selector)).items
    except Forbidden:
        return ()
