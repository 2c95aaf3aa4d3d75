"""Is a kind's definition gone? The API server lets one go only after all objects of its kind, some time after DELETE
was answered; who defines the kind anew before that loses it again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import typer

from meshlib.cli.failure import CommandFailed
from meshlib.kube.errors import NotFound

if TYPE_CHECKING:
    from meshlib.kube.client import KubeClient

PATIENCE = 120.0
"""Seconds for definitions to go. An object with a finalizer whose controller is away holds its kind for good."""
LOOK = 0.25
"""Seconds between two looks."""
REMIND = 3.0
"""Seconds after which the API server is reminded of a definition that is still there. Its finalizer can forget one: a
look that fails (`storage is (re)initializing`, just after the kind was defined) is tried again with a copy from before
the status that it has just written, that is a conflict, and a conflict waits for news that had come already
(apiextensions-apiserver, crd_finalizer.go). It looks again with its next resync, minutes later, or once anything but
that status changes."""
REMINDED = "meshlib.io/deletion-seen"
"""The annotation that changes then."""


async def ended(client: KubeClient, paths: Collection[str]) -> None:
    """Wait until none of these definitions is there, or being deleted. Raises CommandFailed after PATIENCE, with what
    the API server says of those that are left, and KubernetesError."""
    loop = asyncio.get_running_loop()
    began = reminded = loop.time()
    count = 0
    while left := await _left(client, paths):
        now = loop.time()
        if now - began > PATIENCE:
            told = "; ".join(f"{name}: {reason}" for name, reason in sorted(left.values()))
            raise CommandFailed(f"still being deleted after {PATIENCE:g} s: {told}")
        if now - reminded > REMIND:
            reminded, count = now, count + 1
            for path in left:
                await _remind(client, path, count)
        await asyncio.sleep(LOOK)


async def _left(client: KubeClient, paths: Collection[str]) -> Mapping[str, tuple[str, str]]:
    """By path: name, and why it is still there."""
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        try:
            given = await client.get(path)
        except NotFound:
            continue
        if is_ending(given):
            found[path] = (str(given["metadata"]["name"]), _reason(given))
    return found


async def _remind(client: KubeClient, path: str, count: int) -> None:
    try:
        await client.merge(path, {"metadata": {"annotations": {REMINDED: str(count)}}})
    except NotFound:
        pass
    else:
        typer.echo(f"waiting for {path.rpartition('/')[2]} to be deleted", err=True)


def is_ending(given: Mapping[str, Any]) -> bool:
    """Whether an object was deleted, and is there for its finalizers only."""
    return bool((given.get("metadata") or {}).get("deletionTimestamp"))


def _reason(given: Mapping[str, Any]) -> str:
    conditions = (given.get("status") or {}).get("conditions") or ()
    said = (str(each.get("message") or "") for each in conditions if each.get("type") == "Terminating")
    return next(filter(None, said), "nothing is said of the reason")
