"""What is wrong with an object, told where its author looks? Istio's validation messages, in each object's status, and
what the Gateway API wants to be said of its routes.

As istiod writes them with its analysis on: `status.validationMessages` with code, level and a link; `status.parents` of
routes with the conditions Accepted and ResolvedRefs; of a Gateway of ours its addresses, and for it and each listener
Accepted and Programmed. Of several replicas the one that holds the Lease writes; an object that is well and has no
messages is not touched. What others wrote to the status stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from meshlib.controlplane.kubernetes import CUSTOM, GATEWAY_CLASSES, GATEWAYS, ROUTES, KubernetesSource, Watched
from meshlib.errors import ConfigurationError
from meshlib.istio.analyze import Message, analyze
from meshlib.istio.gateway_api import ParentStatus, conditions, convert
from meshlib.istio.gateway_kinds import CONTROLLER
from meshlib.istio.gateway_listeners import LABEL, Condition, GatewayStatus
from meshlib.istio.resources import Object as IstioObject
from meshlib.istio.services import DOMAIN
from meshlib.kube.client import KubeClient, Object, Resource
from meshlib.kube.errors import Conflict, KubernetesError, NotFound
from meshlib.kube.lease import Election
from meshlib.kube.reflector import Key

logger = logging.getLogger("meshlib.controlplane")

LEASE = "meshlib-status"
QUIET = 1.0
"""Seconds in which further changes may come along: a status may be a moment late."""
AGAIN = 30.0
"""Seconds after which what could not be written is tried again."""
Look = Callable[[], tuple[Sequence[IstioObject], Sequence[ConfigurationError]]]


class StatusWriter:
    """Belongs to the client's event loop. look: what is in force, and what is wrong with some of it. joined: the hosts
    of services that processes have joined.

    namespace: of the Lease. identity: unique for each replica.
    """

    def __init__(
        self,
        client: KubeClient,
        source: KubernetesSource,
        look: Look,
        *,
        namespace: str,
        identity: str,
        quiet: float = QUIET,
        joined: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._client, self._source, self._look, self._quiet, self._joined = client, source, look, quiet, joined
        self._news = asyncio.Event()
        self._told: set[str] = set()
        source.on_addresses = self.wake
        self.election = Election(client, namespace, LEASE, identity, on_change=lambda _: self.wake())

    def wake(self) -> None:
        """Something has changed. On the event loop."""
        self._news.set()

    async def run(self) -> None:
        """Until it is cancelled; the Lease is given back then."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.election.run(), name="status lease")
            group.create_task(self._write_all(), name="statuses")

    async def _write_all(self) -> None:
        is_behind = False
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), AGAIN if is_behind else None)
            self._news.clear()
            await asyncio.sleep(self._quiet)
            if not self.election.is_leader:
                is_behind = False
                continue
            try:
                objects, problems = self._look()
                messages = await asyncio.to_thread(analyze, objects, problems, is_whole=True)
                converted = await asyncio.to_thread(convert, objects, self._joined())
                written = [
                    await self._write(messages),
                    await self._write_routes(converted.statuses),
                    await self._write_gateways(converted.gateways),
                ]
                is_behind = not all(written)
            except Exception:
                logger.exception("statuses can't be written")
                is_behind = True

    async def _write(self, messages: Iterable[Message]) -> bool:
        """Whether all is written."""
        by_origin: dict[str, list[Message]] = {}
        for each in messages:
            by_origin.setdefault(each.origin, []).append(each)
        is_done = True
        for resource, given in self._objects():
            metadata = given["metadata"]
            title = f"{given['kind']} {metadata.get('namespace', '')}/{metadata['name']}"
            body = _change(given, by_origin.get(title, ()))
            if body is None:
                continue
            if not self.election.is_leader:
                return True
            is_done &= await self._send(resource, given, body)
        return is_done

    async def _write_routes(self, statuses: Iterable[ParentStatus]) -> bool:
        told = {route.key: (route, parents) for route, parents in conditions(statuses)}
        is_done = True
        for each in ROUTES:
            for key, given in tuple(self._source.reflectors[each.resource.title].objects.items()):
                route, parents = told.get((each.resource.kind, *key), (None, []))
                if route is not None and not _is_of(route, given):
                    continue
                body = _with_parents(given, parents)
                if body is not None and self.election.is_leader:
                    is_done &= await self._send(each.resource, given, body)
        return is_done

    async def _write_gateways(self, statuses: Iterable[GatewayStatus]) -> bool:
        told = {(each.gateway.namespace, each.gateway.name): each for each in statuses}
        is_done = True
        for key, given in self._held(GATEWAYS):
            if (status := told.get((key.namespace, key.name))) is not None and _is_of(status.gateway, given):
                body = _with_gateway(given, status.told(list(self._addresses(key))))
                if body is not None and self.election.is_leader:
                    is_done &= await self._send(GATEWAYS.resource, given, body)
        for _, given in self._held(GATEWAY_CLASSES):
            if (given.get("spec") or {}).get("controllerName") == CONTROLLER:
                known = (given.get("status") or {}).get("conditions") or []
                accepted = _with_conditions([Condition(True, "Accepted").told("Accepted")], known, _generation(given))
                if accepted != known and self.election.is_leader:
                    body = _about(given, {"conditions": accepted})
                    is_done &= await self._send(GATEWAY_CLASSES.resource, given, body)
        return is_done

    def _held(self, watched: Watched) -> tuple[tuple[Key, Object], ...]:
        """A copy: the reflectors go on meanwhile."""
        return tuple(self._source.reflectors[watched.resource.title].objects.items())

    def _addresses(self, gateway: Key) -> Iterator[dict[str, object]]:
        """Of the Services in front of a Gateway's processes: the load balancer's, else the Service's own name."""
        for key, given in tuple(self._source.reflectors["services"].objects.items()):
            selector = (given.get("spec") or {}).get("selector") or {}
            if key.namespace != gateway.namespace or selector.get(LABEL) != gateway.name:
                continue
            balancer = (given.get("status") or {}).get("loadBalancer") or {}
            found = list(balancer.get("ingress") or ())
            for each in found:
                if each.get("ip"):
                    yield {"type": "IPAddress", "value": each["ip"]}
                elif each.get("hostname"):
                    yield {"type": "Hostname", "value": each["hostname"]}
            if not found:
                yield {"type": "Hostname", "value": f"{key.name}.{key.namespace}.svc.{DOMAIN}"}

    def _objects(self) -> Iterator[tuple[Resource, Object]]:
        """A copy: the reflectors go on meanwhile."""
        for each in CUSTOM:
            for given in tuple(self._source.reflectors[each.resource.title].objects.values()):
                yield each.resource, given

    async def _send(self, resource: Resource, given: Object, body: Object) -> bool:
        version = str(given["apiVersion"]).rpartition("/")[2]
        metadata = given["metadata"]
        path = resource.path(version, str(metadata.get("namespace", "")), str(metadata["name"]), "status")
        try:
            await self._client.merge(path, body)
        except (NotFound, Conflict):
            return True  # it is gone, or has changed: the watch tells, and then it is looked at again
        except KubernetesError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                logger.warning("%s", error)
            return False
        return True

    def __repr__(self) -> str:
        return f"<StatusWriter {self.election!r}>"


def _change(given: Object, messages: Sequence[Message]) -> Object | None:
    """The merge patch that makes the status say this; None where it does already."""
    status: Mapping[str, Any] = given.get("status") or {}
    wanted = [dict(each) for each in _once(each.in_status for each in messages)]
    known = status.get("validationMessages") or []
    metadata = given["metadata"]
    generation = str(metadata.get("generation", ""))
    if wanted == known and (not wanted or str(status.get("observedGeneration", "")) == generation):
        return None
    return _about(given, {"observedGeneration": generation, "validationMessages": wanted or None})


def _with_parents(given: Object, parents: Sequence[dict[str, Any]]) -> Object | None:
    """The merge patch that makes `status.parents` say this of our parents, and keeps what others say of theirs."""
    known: list[dict[str, Any]] = (given.get("status") or {}).get("parents") or []
    ours = [each for each in known if each.get("controllerName") == CONTROLLER]
    metadata = given["metadata"]
    wanted = [_dated(each, ours, metadata.get("generation")) for each in parents]
    if wanted == ours:
        return None
    others = [each for each in known if each.get("controllerName") != CONTROLLER]
    return _about(given, {"parents": [*others, *wanted]})


def _with_gateway(given: Object, wanted: dict[str, Any]) -> Object | None:
    """The merge patch that makes a Gateway's status say this. Conditions of other types stay."""
    status: Mapping[str, Any] = given.get("status") or {}
    generation = _generation(given)
    listeners = []
    for each in wanted["listeners"]:
        known_listeners: list[dict[str, Any]] = status.get("listeners") or []
        before = next((one for one in known_listeners if one.get("name") == each["name"]), {})
        dated = _conditions(each["conditions"], before.get("conditions") or (), generation)
        listeners.append({**each, "conditions": dated})
    now = {
        "addresses": wanted["addresses"],
        "conditions": _with_conditions(wanted["conditions"], status.get("conditions") or (), generation),
        "listeners": listeners,
    }
    return None if all(status.get(name, []) == each for name, each in now.items()) else _about(given, now)


def _is_of(translated: IstioObject, given: Object) -> bool:
    """Whether what was translated is what the object says now, which is one generation. Of a newer one there is nothing
    to say yet; one that can't be used is told by its messages, and what is in force is still the older one."""
    return bool(translated.raw.get("spec") == given.get("spec"))


def _generation(given: Object) -> object:
    return given["metadata"].get("generation")


def _about(given: Object, status: Object) -> Object:
    """A merge patch, about this form of the object and no later one."""
    return {"metadata": {"resourceVersion": given["metadata"]["resourceVersion"]}, "status": status}


def _dated(parent: dict[str, Any], known: Sequence[dict[str, Any]], generation: object) -> dict[str, Any]:
    before = next((each for each in known if each.get("parentRef") == parent["parentRef"]), {})
    return {**parent, "conditions": _conditions(parent["conditions"], before.get("conditions") or (), generation)}


def _with_conditions(
    wanted: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]], generation: object
) -> list[dict[str, Any]]:
    """Those of other types stay. What the CRD begins with says "Pending" of the very types that are ours."""
    ours = {each["type"] for each in wanted}
    others = [each for each in known if each.get("type") not in ours]
    return [*others, *_conditions(wanted, known, generation)]


def _conditions(
    wanted: Iterable[dict[str, Any]], known: Iterable[dict[str, Any]], generation: object
) -> list[dict[str, Any]]:
    """With lastTransitionTime: when a condition's status was last another one."""
    old = {each.get("type"): each for each in known}
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def dated(condition: dict[str, Any]) -> dict[str, Any]:
        last = old.get(condition["type"], {})
        since = last.get("lastTransitionTime") if last.get("status") == condition["status"] else None
        return {**condition, "observedGeneration": generation, "lastTransitionTime": since or now}

    return [dated(each) for each in wanted]


def _once(messages: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """They bear no place, so that two of one kind are the same."""
    found: list[dict[str, object]] = []
    for each in messages:
        if each not in found:
            found.append(each)
    return found
