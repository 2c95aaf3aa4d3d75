"""Which objects does Kubernetes have that the mesh asks for? Lists and watches, read as files are.

- An object that can't be used is a problem, and its last good form stays in force.
- A security object that was never usable refuses whatever it may select until it is mended (istio/closing.py).
- A kind whose CRD is not installed has no objects; it is watched as soon as it is installed.
- A kind that may not be listed is not one without objects: nobody is served before all could be listed, and what was
  known stays when a right is taken away. Else a role that lacks a line would switch AuthorizationPolicies off.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from meshlib.controlplane.gathered import Gathered, Update
from meshlib.controlplane.kinds import NETWORKING, OWN, SECURITY
from meshlib.errors import ConfigurationError
from meshlib.istio import closing
from meshlib.istio.folder import Contents
from meshlib.istio.gateway_kinds import GROUP as GATEWAY_API
from meshlib.istio.parse import Parsed, parse_value
from meshlib.istio.problems import in_order
from meshlib.istio.resources import MESH_CONFIG_KEY
from meshlib.kube.client import METADATA, KubeClient, Object, Resource
from meshlib.kube.errors import NotFound
from meshlib.kube.reflector import ABSENT, FIRST_PAUSE, Changes, Key, Reflector, Refusals

logger = logging.getLogger("meshlib.controlplane")

SOURCE = "kubernetes"
"""In messages, where a file has its name."""
QUIET = 0.05
"""Seconds in which further changes may come along."""
PATIENCE = 10.0
"""Seconds of waiting for the first lists before the log says, again and again, what is missing."""


class Watched(NamedTuple):
    resource: Resource
    namespace: str = ""
    params: Mapping[str, str] = {}


def _istio(kind: str, plural: str, group: str, *versions: str) -> Watched:
    return Watched(Resource(kind, plural, group, versions))


_ALL = ("v1", "v1beta1", "v1alpha3")
CUSTOM = (
    _istio("VirtualService", "virtualservices", NETWORKING, *_ALL),
    _istio("DestinationRule", "destinationrules", NETWORKING, *_ALL),
    _istio("ServiceEntry", "serviceentries", NETWORKING, *_ALL),
    _istio("WorkloadEntry", "workloadentries", NETWORKING, *_ALL),
    _istio("Sidecar", "sidecars", NETWORKING, *_ALL),
    _istio("Gateway", "gateways", NETWORKING, *_ALL),
    _istio("EnvoyFilter", "envoyfilters", NETWORKING, "v1alpha3"),
    _istio("PeerAuthentication", "peerauthentications", SECURITY, "v1", "v1beta1"),
    _istio("AuthorizationPolicy", "authorizationpolicies", SECURITY, "v1", "v1beta1"),
    _istio("RequestAuthentication", "requestauthentications", SECURITY, "v1", "v1beta1"),
    _istio("Telemetry", "telemetries", "telemetry.istio.io", "v1", "v1alpha1"),
    _istio("BackendTrafficPolicy", "backendtrafficpolicies", OWN, "v1alpha1"),
    _istio("RateLimit", "ratelimits", OWN, "v1alpha1"),
)
"""Whatever stands in them, people wrote it for the mesh: their status is ours to write."""
ROUTES = (
    _istio("HTTPRoute", "httproutes", GATEWAY_API, "v1", "v1beta1"),
    _istio("GRPCRoute", "grpcroutes", GATEWAY_API, "v1"),
)
GATEWAYS = _istio("Gateway", "gateways", GATEWAY_API, "v1", "v1beta1")
GATEWAY_CLASSES = Watched(Resource("GatewayClass", "gatewayclasses", GATEWAY_API, ("v1", "v1beta1"), namespaced=False))
WITHOUT_EFFECT = (
    _istio("WorkloadGroup", "workloadgroups", NETWORKING, *_ALL),
    _istio("ProxyConfig", "proxyconfigs", NETWORKING, "v1beta1"),
    _istio("WasmPlugin", "wasmplugins", "extensions.istio.io", "v1alpha1"),
    _istio("BackendTLSPolicy", "backendtlspolicies", GATEWAY_API, "v1", "v1alpha3"),
    _istio("TLSRoute", "tlsroutes", GATEWAY_API, "v1", "v1alpha3", "v1alpha2"),
    _istio("TCPRoute", "tcproutes", GATEWAY_API, "v1alpha2"),
    _istio("UDPRoute", "udproutes", GATEWAY_API, "v1alpha2"),
    _istio("ListenerSet", "listenersets", GATEWAY_API, "v1"),
    _istio("XListenerSet", "xlistenersets", "gateway.networking.x-k8s.io", "v1alpha1"),
)
"""Watched only to be reported: whoever wrote one should hear that nothing follows of it. Nobody waits for them."""
_UNNEEDED = frozenset(each.resource.title for each in WITHOUT_EFFECT)
_, _ROOT, _MESH_CONFIG = MESH_CONFIG_KEY
WATCHED = (
    Watched(Resource("Namespace", "namespaces", namespaced=False)),
    Watched(Resource("Node", "nodes", namespaced=False)),
    Watched(Resource("Service", "services")),
    Watched(Resource("EndpointSlice", "endpointslices", "discovery.k8s.io")),
    Watched(Resource("Pod", "pods")),
    Watched(Resource("ServiceAccount", "serviceaccounts")),
    Watched(Resource("ConfigMap", "configmaps"), _ROOT, {"fieldSelector": f"metadata.name={_MESH_CONFIG}"}),
    *CUSTOM,
    *ROUTES,
    GATEWAYS,
    GATEWAY_CLASSES,
    *WITHOUT_EFFECT,
    _istio("ReferenceGrant", "referencegrants", GATEWAY_API, "v1", "v1beta1"),
)
CRDS = Resource("CustomResourceDefinition", "customresourcedefinitions", "apiextensions.k8s.io", namespaced=False)


class KubernetesSource:
    """Follows one cluster. Belongs to the client's event loop.

    publish: told everything there is, once all kinds were listed, and after each change what has changed. pauses:
    seconds, for tests: see Reflector.
    """

    def __init__(
        self,
        client: KubeClient,
        publish: Callable[[Update], None],
        *,
        first_pause: float = FIRST_PAUSE,
        absent: float = ABSENT,
    ) -> None:
        self._publish = publish
        self._gathered = Gathered()
        self._contents: dict[tuple[str, Key], Object] = {}
        """What each object was read from, but for a last good form of it."""
        self._addresses: dict[Key, Object] = {}
        self.on_addresses: Callable[[], None] = lambda: None
        """Called when a Service's load balancer has got another address, which is published to nobody."""
        self._is_complete = False
        self._due: asyncio.TimerHandle | None = None
        refusals = Refusals()
        self.reflectors: Mapping[str, Reflector] = {
            each.resource.title: Reflector(
                client,
                each.resource,
                functools.partial(self._take, each.resource),
                namespace=each.namespace,
                params=each.params,
                keep=kept,
                first_pause=first_pause,
                absent=absent,
                refusals=refusals,
            )
            for each in WATCHED
        }
        """By the resource's title. What they hold has its status and versions; what is published has not."""
        self._crds = Reflector(
            client, CRDS, self._look, accept=METADATA, first_pause=first_pause, absent=absent, refusals=refusals
        )

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for reflector in (*self.reflectors.values(), self._crds):
                    group.create_task(reflector.run(), name=f"watch {reflector.resource.title}")
                await self._first()
        finally:
            if self._due is not None:
                self._due.cancel()

    async def _first(self) -> None:
        for title, reflector in self.reflectors.items():
            while title not in _UNNEEDED and not reflector.has_synced.is_set():
                try:
                    await asyncio.wait_for(reflector.has_synced.wait(), PATIENCE)
                except TimeoutError:
                    for title, missing in self._missing():
                        logger.warning("nobody is served before Kubernetes has told its %s: %s", title, missing)
        self._is_complete = True
        self._tell()

    def _missing(self) -> Iterator[tuple[str, str]]:
        for title, reflector in self.reflectors.items():
            if title not in _UNNEEDED and not reflector.has_synced.is_set():
                yield title, str(reflector.error or "no answer yet")

    def troubles(self) -> Sequence[ConfigurationError]:
        """What is not up to date now, and why. A kind that is not installed is no trouble."""
        return tuple(
            ConfigurationError(SOURCE, title, "", f"what was last known of it stays: {reflector.error}")
            for title, reflector in self.reflectors.items()
            if reflector.error is not None and not isinstance(reflector.error, NotFound) and title not in _UNNEEDED
        )

    # What the reflectors tell

    def _take(self, resource: Resource, changes: Changes) -> None:
        has_changed = False
        if resource.kind == "Service":
            self._take_addresses(changes)
        for key, given in changes.items():
            place = (resource.title, key)
            if given is None:
                if self._contents.pop(place, None) is not None:
                    self._gathered.put(place, None)
                    has_changed = True
                continue
            content = _content(given)
            if self._contents.get(place) != content:
                self._contents[place] = content
                self._gathered.put(place, _parsed(content, self._gathered.get(place)))
                has_changed = True
        if has_changed and self._is_complete and self._due is None:
            self._due = asyncio.get_running_loop().call_later(QUIET, self._tell)

    def _take_addresses(self, changes: Changes) -> None:
        found = {key: (given or {}).get("status") or {} for key, given in changes.items()}
        if any(self._addresses.get(key, {}) != status for key, status in found.items()):
            self._addresses.update(found)
            self.on_addresses()
        for key, given in changes.items():
            if given is None:
                self._addresses.pop(key, None)

    def _tell(self) -> None:
        self._due = None
        self._publish(self._gathered.news())

    def _look(self, changes: Changes) -> None:
        """A CRD is new, or has got its "Established": its objects can be listed, or will be able to soon."""
        for key, given in changes.items():
            if given is not None and (reflector := self.reflectors.get(key.name)) is not None:
                reflector.look()

    def __repr__(self) -> str:
        missing = sum(1 for _ in self._missing())
        return f"<KubernetesSource {len(self._contents)} objects{f', {missing} kinds missing' if missing else ''}>"


async def read_cluster(client: KubeClient) -> Contents:
    """All that a KubernetesSource would follow, once, with all annotations. Raises KubernetesError: what may not be
    listed is not absent."""
    parts: list[Parsed] = []
    for resource, namespace, params in WATCHED:
        for version in resource.versions:
            try:
                found = await client.list(resource.path(version, namespace), **params)
            except NotFound:
                continue
            parts += (parse_value(each, SOURCE) for each in found.items)
            break
    return _together(parts)


def _together(parts: Sequence[Parsed]) -> Contents:
    return Contents(
        tuple(each for part in parts for each in part.objects),
        in_order(each for part in parts for each in part.problems),
        tuple(each for part in parts for each in part.warnings),
    )


def _parsed(content: Object, old: Parsed | None) -> Parsed:
    try:
        found = parse_value(content, SOURCE)
    except Exception as error:  # a defect of ours must not end the watch of all others
        logger.exception("an object can't be read")
        told = ConfigurationError(SOURCE, str(content.get("kind")), "", f"can't be read: {type(error).__name__}")
        found = Parsed((), (told,), (), closing.of_value(content, told, "default"))
    if found.problems and old is not None and old.objects:
        return Parsed(old.objects, found.problems, old.warnings)
    return found


# What is kept of an object

_METADATA = ("name", "namespace", "labels", "annotations", "creationTimestamp", "deletionTimestamp")
_VERSIONS = ("resourceVersion", "generation", "uid")
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def kept(given: Object) -> Object:
    """The part that anybody here looks at: a pod of ten kilobytes is one of some hundred bytes."""
    kind = given.get("kind")
    metadata: Object = {
        name: given["metadata"][name] for name in (*_METADATA, *_VERSIONS) if name in given.get("metadata", {})
    }
    if kind in ("Pod", "Node"):
        metadata.pop("annotations", None)
    elif annotations := metadata.get("annotations"):
        metadata["annotations"] = {name: each for name, each in annotations.items() if name != _LAST_APPLIED}
    found = {**given, "metadata": metadata}
    match kind:
        case "Pod":
            found |= {"spec": _pod_spec(given.get("spec") or {}), "status": _pod_status(given.get("status") or {})}
        case "Node" | "Namespace" | "ServiceAccount":
            found = {name: found[name] for name in ("apiVersion", "kind", "metadata") if name in found}
        case "Service":
            found["status"] = {"loadBalancer": (given.get("status") or {}).get("loadBalancer") or {}}
    return found


def _pod_spec(given: Object) -> Object:
    containers: list[Any] = given.get("containers") or []
    names = ("serviceAccountName", "nodeName")
    return {
        "containers": [{name: each[name] for name in ("name", "ports") if name in each} for each in containers],
        **{name: given[name] for name in names if name in given},
    }


def _pod_status(given: Object) -> Object:
    """Times and messages left out: they change, and mean nothing to a mesh."""
    conditions: list[Any] = given.get("conditions") or []
    ready = [{"type": "Ready", "status": each.get("status")} for each in conditions if each.get("type") == "Ready"]
    return {name: given[name] for name in ("podIP", "phase") if name in given} | {"conditions": ready}


def _content(given: Object) -> Object:
    """What people wrote, and what pods are: without the versions and the status that others, we too, write to it."""
    metadata = {name: each for name, each in given["metadata"].items() if name not in _VERSIONS}
    found = {**given, "metadata": metadata}
    if given.get("kind") != "Pod":
        found.pop("status", None)
    return found
