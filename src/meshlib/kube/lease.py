"""Which replica writes? The one that holds a Lease, as client-go's leader election has it.

Only the server's optimistic concurrency decides, never two clocks: a lease counts as expired once it has not changed
for `duration` seconds of our own clock. A leader that can't renew steps down before others may take over.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import random
import time
from collections.abc import Callable

from meshlib.kube.client import KubeClient, Object, Resource
from meshlib.kube.errors import Conflict, KubernetesError, NotFound

logger = logging.getLogger("meshlib.kube")

LEASES = Resource("Lease", "leases", "coordination.k8s.io")
DURATION, RENEW_WITHIN, RETRY = 15.0, 10.0, 2.0
"""Seconds, as client-go's components have them."""
RELEASE_WITHIN = 5.0
"""Seconds for which a replica that ends tries to give the lease back; Kubernetes' grace is 30."""


class Election:
    """Stands for election until it is cancelled; then gives the lease back, so that another need not wait for it.

    identity: unique for each replica. on_change: called on the loop with whether we lead, when that changes.
    """

    def __init__(
        self,
        client: KubeClient,
        namespace: str,
        name: str,
        identity: str,
        *,
        on_change: Callable[[bool], None] = lambda _: None,
        duration: float = DURATION,
        renew_within: float = RENEW_WITHIN,
        retry: float = RETRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._namespace, self._name, self.identity = client, namespace, name, identity
        self._on_change, self._clock = on_change, clock
        self._duration, self._renew_within, self._retry = duration, renew_within, retry
        self.is_leader = False
        self._renewed = 0.0
        self._seen: tuple[str, float] = ("", 0.0)
        """The lease's resourceVersion, and when we first saw it."""

    async def run(self) -> None:
        try:
            while True:
                began = self._clock()
                # Bounded: an answer that comes too late must not find us still leading.
                until = (self._renewed if self.is_leader else began) + self._renew_within
                try:
                    async with asyncio.timeout(max(0.0, until - began)):
                        leads = await self._try()
                except (KubernetesError, TimeoutError) as error:
                    logger.info("the lease %s/%s: %s", self._namespace, self._name, str(error) or "no answer in time")
                    leads = self.is_leader and self._clock() < until
                else:
                    if leads:
                        self._renewed = began
                self._set(leads)
                pause = self._retry * (1 + 0.2 * random.random())
                if self.is_leader:
                    pause = min(pause, max(0.0, self._renewed + self._renew_within - self._clock()))
                await asyncio.sleep(pause)
        finally:
            if self.is_leader:
                self._set(False)
                with contextlib.suppress(KubernetesError, TimeoutError):
                    async with asyncio.timeout(RELEASE_WITHIN):
                        await self._release()

    async def _try(self) -> bool:
        """Whether we hold the lease now, renewed or taken over."""
        try:
            lease = await self._client.get(LEASES.path("v1", self._namespace, self._name))
        except NotFound:
            return await self._create()
        spec = lease.get("spec") or {}
        version = str(lease["metadata"].get("resourceVersion", ""))
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        holder = str(spec.get("holderIdentity") or "")
        is_ours = holder == self.identity
        lasts = float(spec.get("leaseDurationSeconds") or self._duration)
        if holder and not is_ours and self._clock() - self._seen[1] < lasts:
            return False
        return await self._write(lease, self._spec(spec, is_new=not is_ours))

    async def _create(self) -> bool:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec({}, is_new=True),
        }
        try:
            await self._client.create(LEASES.path("v1", self._namespace), body)
        except Conflict:
            return False
        return True

    async def _write(self, lease: Object, spec: Object) -> bool:
        try:
            await self._client.replace(LEASES.path("v1", self._namespace, self._name), {**lease, "spec": spec})
        except Conflict:
            return False
        return True

    def _spec(self, before: Object, *, is_new: bool) -> Object:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            **before,
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self._duration)),
            "renewTime": now,
        }
        if is_new:
            spec |= {"acquireTime": now, "leaseTransitions": int(before.get("leaseTransitions") or 0) + bool(before)}
        return spec

    async def _release(self) -> None:
        lease = await self._client.get(LEASES.path("v1", self._namespace, self._name))
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") == self.identity:
            await self._write(lease, {**spec, "holderIdentity": "", "leaseDurationSeconds": 1})

    def _set(self, leads: bool) -> None:
        if leads is not self.is_leader:
            self.is_leader = leads
            now = "holds" if leads else "has lost"
            logger.info("%s %s the lease %s/%s", self.identity, now, self._namespace, self._name)
            self._on_change(leads)

    def __repr__(self) -> str:
        return f"<Election {self._namespace}/{self._name} {self.identity} {'leads' if self.is_leader else 'waits'}>"
