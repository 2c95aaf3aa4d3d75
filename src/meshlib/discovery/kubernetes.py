"""Who serves a Service now? The feed of a process that asks Kubernetes itself, without a control plane.

A host is asked for when it is first called, and watched from then on: its Service and its EndpointSlices, and nothing
else. A name that no Service has goes where it would go without us, and is looked for again now and then. What was last
known serves for as long as the API server does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import NamedTuple

import msgspec

from meshlib.discovery.hosts import Answer, HostsSource
from meshlib.istio import resources as r
from meshlib.istio.parse import parse_value
from meshlib.istio.services import DOMAIN, Registry, fqdn
from meshlib.kube.client import KubeClient, Resource
from meshlib.kube.errors import Forbidden, KubernetesError, NotFound
from meshlib.kube.reflector import FIRST_PAUSE, LONGEST_PAUSE, Changes, Reflector
from meshlib.kube.settings import KubeSettings
from meshlib.model import ClusterType

_log = logging.getLogger("meshlib.discovery")

SERVICES = Resource("Service", "services")
SLICES = Resource("EndpointSlice", "endpointslices", "discovery.k8s.io")
AGAIN = 30.0
"""Seconds after which a Service that was not there is looked for again."""


class _Name(NamedTuple):
    namespace: str
    service: str


class KubernetesSource(HostsSource):
    """Feed of one process from a Kubernetes API server. A Source.

    namespace: whose Services have short names; "" is that of `settings`. zone: where this process runs, by
    which hints of EndpointSlices are followed; "" is unknown. It needs `get`, `list` and `watch` of services and `list`
    and `watch` of endpointslices, in the namespaces of the Services that are called.
    """

    name = "kubernetes"

    def __init__(
        self,
        settings: KubeSettings,
        namespace: str = "",
        *,
        zone: str = "",
        again: float = AGAIN,
        first_pause: float = FIRST_PAUSE,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._namespace = namespace or settings.namespace
        self._zone = zone
        self._again, self._first_pause = again, first_pause
        self._rng = rng or random.Random()
        self._client: KubeClient

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[object]:
        async with KubeClient(self._settings) as self._client:
            yield None

    async def _keep(self, authority: str) -> None:
        host, _, port = authority.rpartition(":")
        name = _service_of(host, self._namespace)
        if name is None or not port.isdecimal():
            self._answered(authority, None)
            return
        while True:
            try:
                await self._until_there(authority, name)
                await self._follow(authority, name, int(port))
            except Exception:
                # A defect of ours; what was known stays, and it gets another chance.
                _log.exception("%s can't be followed", authority)
                await self._sleep(self._again)

    async def _until_there(self, authority: str, name: _Name) -> None:
        """Returns when there is such a Service."""
        failures = 0
        while True:
            try:
                await self._client.get(SERVICES.path("v1", *name))
                await self._client.get(SLICES.path("v1", name.namespace), limit="1", **_of(name))  # may they be listed?
                return
            except NotFound:
                failures = 0
                self._answered(authority, None)
                pause = self._again
            except Forbidden as error:
                # `example.com` may be a Service in the namespace `com`, which nobody needs to let us see.
                if failures == 0:
                    level = logging.WARNING if name.namespace == self._namespace else logging.INFO
                    _log.log(level, "%s is left to DNS: %s", authority, error)
                if authority not in self._answers:
                    self._answered(authority, None)
                # An API server that has just started refuses everything, until it has read its roles.
                pause = min(self._again, self._first_pause * 2.0 ** min(failures, 10))
                failures += 1
            except KubernetesError as error:
                if failures == 0:
                    known = authority in self._answers
                    what = "what was last known of it stays" if known else "nothing is known of it"
                    _log.warning("Kubernetes says nothing of %s, %s: %s", authority, what, error)
                pause = min(LONGEST_PAUSE, self._first_pause * 2.0 ** min(failures, 10))
                failures += 1
            await self._sleep(pause)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._rng.uniform(0.5, 1.0))

    async def _follow(self, authority: str, name: _Name, port: int) -> None:
        """Returns when the Service is gone."""
        is_gone = asyncio.Event()

        def tell(_: Changes) -> None:
            if not (service.has_synced.is_set() or service.objects):
                return
            if not service.objects:
                is_gone.set()
            elif slices.has_synced.is_set() or slices.objects:
                self._answered(authority, _endpoints(service, slices, name, port, self._zone))

        def reflector(resource: Resource, **params: str) -> Reflector:
            return Reflector(
                self._client, resource, tell, namespace=name.namespace, params=params, first_pause=self._first_pause
            )

        service = reflector(SERVICES, fieldSelector=f"metadata.name={name.service}")
        slices = reflector(SLICES, **_of(name))
        tasks = [asyncio.create_task(each.run()) for each in (service, slices)]
        tasks.append(asyncio.create_task(self._first_answer(service, slices, tell)))
        try:
            await is_gone.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first_answer(self, service: Reflector, slices: Reflector, tell: Callable[[Changes], None]) -> None:
        """An empty list is told before it counts as synced."""
        await asyncio.gather(service.has_synced.wait(), slices.has_synced.wait())
        tell({})

    def __repr__(self) -> str:
        return f"<KubernetesSource {self._settings.server} {len(self._wanted)} hosts wanted>"


def _of(name: _Name) -> dict[str, str]:
    return {"labelSelector": f"kubernetes.io/service-name={name.service}"}


def _service_of(host: str, namespace: str) -> _Name | None:
    """Kubernetes' search path: `reviews`, `reviews.shop`, `reviews.shop.svc`, `reviews.shop.svc.cluster.local`.
    None for what can be no Service."""
    parts = host.lower().rstrip(".").removesuffix(f".{DOMAIN}").split(".")
    if len(parts) == 3 and parts[2] == "svc":
        parts = parts[:2]
    if len(parts) > 2 or not all(parts) or not all(c.isalnum() or c == "-" for part in parts for c in part):
        return None
    return _Name(parts[1] if len(parts) == 2 else namespace, parts[0])


def _endpoints(service: Reflector, slices: Reflector, name: _Name, port: int, zone: str) -> Answer:
    given = (*service.objects.values(), *slices.objects.values())
    objects = [each for value in given for each in parse_value(value, "kubernetes").objects]
    found = Registry(_for_zone(objects, zone), ()).services.get(fqdn(name.service, name.namespace))
    if found is None or found.type is not ClusterType.EDS or found.port(port) is None:
        return None  # an ExternalName, or a port that is not the Service's: DNS and the kernel know better
    return tuple(sorted(instance.endpoint for instance in found.instances[port]))


def _for_zone(objects: list[r.Object], zone: str) -> list[r.Object]:
    """Without the endpoints that Kubernetes wants to be called from other zones. As kube-proxy: hints count only if
    every ready endpoint has some, and one is for this zone (Kubernetes' Topology Aware Routing, safeguards)."""
    slices = [each.spec for each in objects if isinstance(each.spec, r.EndpointSlice)]
    hints = [
        {hint.name for hint in endpoint.hints.for_zones}
        for each in slices
        for endpoint in each.endpoints
        if endpoint.conditions.ready is not False
    ]
    if not zone or not all(hints) or not any(zone in each for each in hints):
        return objects

    def kept(each: r.Object) -> r.Object:
        if not isinstance(each.spec, r.EndpointSlice):
            return each
        own = [one for one in each.spec.endpoints if any(hint.name == zone for hint in one.hints.for_zones)]
        return replace(each, spec=msgspec.structs.replace(each.spec, endpoints=own))

    return [kept(each) for each in objects]
