"""Which services are there, on which ports, and who serves them? Kubernetes', ServiceEntries', and those that running
workloads imply.

The registry is the same for every node; what a node may see of it is decided where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import NamedTuple

from meshlib.errors import ConfigurationError
from meshlib.istio import resources as r
from meshlib.istio.by_label import ByLabel, Labels
from meshlib.istio.instances import (
    Instance,
    Port,
    container_port,
    is_meshed,
    is_ready,
    labels_of_entry,
    locality_of_node,
    of_entry,
    of_joined,
    of_one_family,
    of_workload,
    protocol_named,
    protocol_of,
    served,
    unique,
    why_left_out,
)
from meshlib.istio.sameness import are_same, same_ends
from meshlib.model import ClusterType, Endpoint, Health, Locality, Workload, peer_of
from meshlib.model.values import dataclass

DOMAIN = "cluster.local"
_SUFFIX = f".svc.{DOMAIN}"


@dataclass(frozen=True, slots=True)
class Service:
    """host: `reviews.default.svc.cluster.local`, or a ServiceEntry's host. short: `reviews` for Kubernetes' services,
    which have aliases; "" for others. instances: by port number; none for ORIGINAL_DST. traffic_distribution: what
    Kubernetes' field of that name says, "" for nothing."""

    host: str
    namespace: str
    ports: tuple[Port, ...]
    short: str = ""
    type: ClusterType = ClusterType.EDS
    addresses: tuple[str, ...] = ()
    export_to: tuple[str, ...] = ()
    subject_alt_names: tuple[str, ...] = ()
    instances: Mapping[int, tuple[Instance, ...]] = field(default_factory=dict)
    traffic_distribution: str = ""

    def is_called_like(self, other: Service) -> bool:
        """Whether they differ at most in who serves them: routes and listeners are the same then."""
        return self is other or replace(self, instances={}) == replace(other, instances={})

    def port(self, number: int) -> Port | None:
        return next((port for port in self.ports if port.number == number), None)

    def aliases(self, namespace: str) -> tuple[str, ...]:
        """The names that a caller in `namespace` may use, longest last."""
        return names(self.host, namespace) if self.short else (self.host,)

    def is_visible(self, namespace: str) -> bool:
        return is_exported(self.export_to, self.namespace, namespace)


def cluster_name(host: str, port: int, subset: str = "") -> str:
    return f"outbound|{port}|{subset}|{host}"


def is_exported(export_to: Iterable[str], owner: str, namespace: str) -> bool:
    """Istio's exportTo: empty is everywhere."""
    names = tuple(export_to)
    if not names or "*" in names:
        return True
    if "~" in names:
        return False
    return namespace in names or (namespace == owner and "." in names)


def fqdn(host: str, namespace: str) -> str:
    """A short name in a rule means a service of the rule's namespace; whatever holds a dot is taken as it is
    (pilot/pkg/model/config.go, ResolveShortnameToFQDN)."""
    host = host.lower().rstrip(".")
    if ":" in host:
        return host.strip("[]")  # an IPv6 address
    if "." in host or host == "*":
        return host
    return f"{host}.{namespace}.svc.{DOMAIN}"


def names(host: str, namespace: str) -> tuple[str, ...]:
    """The names by which a caller in `namespace` may call `host`, longest last: Kubernetes' search path."""
    short, dot, rest = host.partition(".")
    home = rest.removesuffix(_SUFFIX)
    if not dot or home == rest or "." in home or "*" in short:
        return (host,)
    qualified = (f"{short}.{home}", f"{short}.{home}.svc", host)
    return (short, *qualified) if namespace == home else qualified


class Registry:
    """Every service there is. services: by host; of several that claim one host, the first of the order below.

    export_to: of services that do not say it themselves (MeshConfig.defaultServiceExportTo). before: of the objects
    before a change: services of EndpointSlices that nothing has changed for are taken over, and are the very same.
    running: more objects, by their kinds, of which `objects` then has none. problems: what was left out, and why.
    """

    def __init__(
        self,
        objects: Iterable[r.Object],
        workloads: Iterable[Workload],
        export_to: tuple[str, ...] = (),
        before: Registry | None = None,
        running: Mapping[str, list[r.Object]] | None = None,
    ) -> None:
        self._export_to = export_to
        self.problems: list[ConfigurationError] = []
        by_kind: dict[str, list[r.Object]] = dict(running or {})
        for each in objects:
            if each.spec is not None:  # a kind of the same name in another API group has none
                by_kind.setdefault(each.kind, []).append(each)
        # By all that they say: an address that is told twice is the same endpoint whoever comes first.
        joined = self._running = sorted(
            workloads,
            key=lambda w: (
                *(w.namespace, w.service, w.name, w.address, w.port),
                *(w.locality, w.labels, w.service_account, w.port_names),
            ),
        )
        self._pod_list = by_kind.get("Pod", [])
        self._pods, changed_pods = _pods_of(self._pod_list, before)
        self._nodes = {node.name: locality_of_node(node.labels) for node in by_kind.get("Node", ())}
        self._meshed: dict[str, frozenset[int]] = {}
        for w in joined:
            if is_meshed(dict(w.labels)):
                ports_of = frozenset(number for _, number in served(w))
                self._meshed[w.address] = self._meshed.get(w.address, frozenset()) | ports_of
        self._workloads_by_label = ByLabel((w.namespace, dict(w.labels), w) for w in joined)
        self._machines = by_kind.get("WorkloadEntry", [])
        self._entries_by_label = ByLabel((each.namespace, labels_of_entry(each), each) for each in self._machines)
        self._workloads_by_host: dict[str, list[Workload]] = {}
        for workload in joined:
            if workload.service:
                host = fqdn(workload.service, workload.namespace)
                self._workloads_by_host.setdefault(host, []).append(workload)
        self._made: dict[tuple[str, str], _Made] = {}
        self._made_of_entries: dict[tuple[str, str], tuple[r.Object, tuple[Service, ...]]] = {}
        self._made_of_workloads: dict[str, Service] = {}
        is_alike = before is not None and before._nodes == self._nodes and before._export_to == export_to
        self._before = before if is_alike else None
        self._changed_pods: frozenset[tuple[str, str]] = frozenset()
        self._is_quiet = False
        """Whether nothing that services are made of has changed but slices, ServiceEntries and the pods above."""
        if self._before is not None:
            self._changed_pods = changed_pods
            self._is_quiet = self._is_quiet_since(self._before)
        self._slices: dict[tuple[str, str], list[r.EndpointSlice]] = {}
        for each in by_kind.get("EndpointSlice", ()):
            assert isinstance(each.spec, r.EndpointSlice)
            owner = each.labels.get("kubernetes.io/service-name", "")
            self._slices.setdefault((each.namespace, owner), []).append(each.spec)
        self._endpoints = {(each.namespace, each.name): each.spec for each in by_kind.get("Endpoints", ())}

        self._all: dict[str, list[Service]] = {}
        for each in by_kind.get("Service", ()):
            self._add(self._known(each))
        for each in by_kind.get("ServiceEntry", ()):
            for service in self._known_entry(each):
                self._add(service)
        for service in self._implied():
            self._add(service)
        self._before = None
        self.services: Mapping[str, Service] = {host: found[0] for host, found in self._all.items()}

    def _add(self, service: Service) -> None:
        """ServiceEntries of one namespace that share a host are one service (sidecar.go, canMergeServices)."""
        known = self._all.setdefault(service.host, [])
        for index, other in enumerate(known):
            if other.namespace == service.namespace:
                if not other.short and not service.short and other.type is service.type:
                    known[index] = _merged(other, service)
                return
        known.append(service)

    def seen_from(self, namespace: str, before: Directory | None = None) -> Directory:
        """What nodes of `namespace` may call: what is exported to it. Of several that claim one host, its own. before:
        what they might call before a change."""
        seen: dict[str, Service] = {}
        for host, claimants in self._all.items():
            visible = [each for each in claimants if each.is_visible(namespace)]
            if visible:
                seen[host] = next((each for each in visible if each.namespace == namespace), visible[0])
        return Directory(seen, before)

    def claimants(self) -> Iterator[Service]:
        """Every service, whoever sees it."""
        for found in self._all.values():
            yield from found

    # What has changed?

    def _is_quiet_since(self, before: Registry) -> bool:
        if before._running != self._running or not are_same(before._machines, self._machines):
            return False
        # A process at a pod's address counts otherwise than one elsewhere.
        pods = [known for place in self._changed_pods for known in (before._pods.get(place), self._pods.get(place))]
        addresses = {each.spec.status.pod_ip for each in pods if each is not None and isinstance(each.spec, r.Pod)}
        return addresses.isdisjoint(w.address for w in self._running)

    @cached_property
    def _pod_addresses(self) -> frozenset[str]:
        pods = (each.spec for each in self._pod_list)
        return frozenset(pod.status.pod_ip for pod in pods if isinstance(pod, r.Pod) and pod.status.pod_ip)

    @cached_property
    def _pods_by_label(self) -> ByLabel[r.Object]:
        return ByLabel((pod.namespace, pod.labels, pod) for pod in self._pod_list)

    # Kubernetes

    def _known(self, given: r.Object) -> Service:
        """Of ten thousand pods one changes: what is made of the others is not made again, nor looked at closely."""
        place = (given.namespace, given.name)
        before = self._before._made.get(place) if self._before is not None else None
        slices = self._slices.get(place)
        if (
            self._is_quiet
            and before is not None
            and slices is not None
            and before.because[0] is given
            and are_same(before.slices, slices)
            and before.pods.isdisjoint(self._changed_pods)
        ):
            self._made[place] = before
            return before.service
        because = self._reasons(given)
        if because is None or slices is None:
            return self._kubernetes(given)
        known = before
        if known is None or len(known.because) != len(because) or not all(map(_is_same, known.because, because)):
            targets = (end.target_ref.name if end.target_ref else "" for each in slices for end in each.endpoints)
            pods = frozenset((given.namespace, target) for target in targets)
            known = _Made(because, self._kubernetes(given), slices, pods)
        self._made[place] = known
        return known.service

    def _reasons(self, given: r.Object) -> tuple[object, ...] | None:
        """All that a service is made of, but for nodes and exportTo; None where that is not told easily."""
        spec = given.spec
        assert isinstance(spec, r.Service)
        slices = self._slices.get((given.namespace, given.name))
        if slices is None or any(True for _ in self._entries_by_label.chosen(given.namespace, spec.selector)):
            return None
        found: list[object] = [given, *slices, None, *self._joined(given, spec), None]
        for each in slices:
            for endpoint in each.endpoints:
                target = endpoint.target_ref.name if endpoint.target_ref else ""
                found.append(self._pods.get((given.namespace, target)))
                found += map(self._meshed.get, endpoint.addresses)
        return tuple(found)

    def _joined(self, given: r.Object, spec: r.Service) -> list[Workload]:
        """The processes that are its endpoints by being connected."""
        host = fqdn(given.name, given.namespace)
        joined = [
            *(w for w in self._workloads_by_host.get(host, ()) if w.namespace == given.namespace),
            *(w for w in self._workloads_by_label.chosen(given.namespace, spec.selector) if not w.service),
        ]
        if (given.namespace, given.name) in self._slices:
            # Probes and preStop hooks decide for a pod: that its process runs does not make it ready.
            joined = [w for w in joined if w.address not in self._pod_addresses]
        return joined

    def _kubernetes(self, given: r.Object) -> Service:
        spec = given.spec
        assert isinstance(spec, r.Service)
        ports = tuple(
            Port(port.port, port.name, protocol_of(port), port.target_port)
            for port in spec.ports
            if port.protocol != "UDP"
        )
        external = spec.type == "ExternalName" and spec.external_name
        host = fqdn(given.name, given.namespace)
        instances: dict[int, tuple[Instance, ...]] = {}
        joined = self._joined(given, spec)
        for port in ports:
            if external:
                found = [Instance(Endpoint(spec.external_name.rstrip("."), port.number), {})]
            else:
                found = [
                    *self._from_kubernetes(given, spec, port, only=len(ports) == 1),
                    *self._from_entries(given, spec.selector, port, ClusterType.EDS),
                    *(instance for w in joined if (instance := of_joined(w, port)) is not None),
                ]
            instances[port.number] = unique(found)
        addresses = () if spec.cluster_ip in ("", "None") else (spec.cluster_ip,)
        annotations = (given.raw.get("metadata") or {}).get("annotations") or {}
        exported = str(annotations.get("networking.istio.io/exportTo", ""))
        return Service(
            host,
            given.namespace,
            ports,
            given.name,
            ClusterType.STRICT_DNS if external else ClusterType.EDS,
            addresses,
            tuple(part.strip() for part in exported.split(",") if part.strip()) or self._export_to,
            (),
            instances,
            str(annotations.get("networking.istio.io/traffic-distribution", "")) or spec.traffic_distribution,
        )

    def _from_entries(self, owner: r.Object, selector: Labels, port: Port, kind: ClusterType) -> Iterator[Instance]:
        """The WorkloadEntries that a selector chooses, in its own namespace."""
        for each in self._entries_by_label.chosen(owner.namespace, selector):
            assert isinstance(each.spec, r.WorkloadEntry)
            if why := why_left_out(each.spec.address, kind):
                reason = f"{why}, so {owner.title} leaves it out"
                self.problems.append(ConfigurationError(each.source, each.title, "spec.address", reason))
                continue
            yield of_entry(each.spec, labels_of_entry(each), port, each.namespace, each.name)

    def _from_kubernetes(self, given: r.Object, spec: r.Service, port: Port, *, only: bool) -> Iterator[Instance]:
        """EndpointSlices say it; else Endpoints; else the pods that the selector chooses. only: the service has no
        other port, so that theirs need not bear its name."""
        place = (given.namespace, given.name)
        if place in self._slices:
            for each in of_one_family(self._slices[place], spec.ip_families):
                yield from self._of_slice(each, given.namespace, port, only=only)
            return
        if place in self._endpoints:
            endpoints = self._endpoints[place]
            assert isinstance(endpoints, r.Endpoints)
            for subset in endpoints.subsets:
                for exposed in subset.ports:
                    if exposed.name == port.name or (only and len(subset.ports) == 1):
                        for address in subset.addresses:
                            target = address.target_ref.name if address.target_ref else ""
                            yield self._of_pod(address.ip, exposed.port, given.namespace, target)
            return
        for pod in self._pods_by_label.chosen(given.namespace, spec.selector):
            assert isinstance(pod.spec, r.Pod)
            number = container_port(pod.spec, port)
            if pod.spec.status.pod_ip and is_ready(pod) and number is not None:
                yield self._of_pod(pod.spec.status.pod_ip, number, pod.namespace, pod.name)

    def _of_slice(self, spec: r.EndpointSlice, namespace: str, port: Port, *, only: bool) -> Iterator[Instance]:
        if spec.address_type == "FQDN":
            return  # deprecated, and an endpoint is an address
        for exposed in spec.ports:
            if exposed.port is None or (exposed.name != port.name and not (only and len(spec.ports) == 1)):
                continue
            for endpoint in spec.endpoints:
                conditions = endpoint.conditions
                # Ready unknown is ready (Kubernetes API, EndpointConditions).
                if conditions.ready is False and not (conditions.terminating and conditions.serving):
                    continue
                health = Health.DRAINING if conditions.terminating else Health.HEALTHY
                target = endpoint.target_ref.name if endpoint.target_ref else ""
                locality = self._nodes.get(endpoint.node_name) or Locality("", endpoint.zone)
                for address in endpoint.addresses:
                    yield self._of_pod(address, exposed.port, namespace, target, locality, health)

    def _of_pod(
        self,
        address: str,
        port: int,
        namespace: str,
        name: str,
        locality: Locality | None = None,
        health: Health = Health.HEALTHY,
    ) -> Instance:
        pod = self._pods.get((namespace, name))
        labels = pod.labels if pod else {}
        locality = self._locality_of(pod) or locality or Locality()
        peer = peer_of(labels, name, namespace) if pod else ""
        account = None
        if pod is not None and isinstance(pod.spec, r.Pod):
            account = (namespace, pod.spec.spec.service_account_name or "default")
        endpoint = Endpoint(
            address,
            port,
            locality=locality,
            health=health,
            workload=name,
            peer=peer,
            is_meshed=is_meshed(labels) or port in self._meshed.get(address, ()),
        )
        return Instance(endpoint, labels, account)

    def _locality_of(self, pod: r.Object | None) -> Locality | None:
        """The pod's own label counts, else its node's (Istio, getPodLocality)."""
        if pod is None or not isinstance(pod.spec, r.Pod):
            return None
        if told := pod.labels.get("istio-locality"):  # a label holds no slash
            return Locality(*told.replace(".", "/").split("/")[:3])
        return self._nodes.get(pod.spec.spec.node_name)

    # ServiceEntry

    def _known_entry(self, given: r.Object) -> Iterable[Service]:
        """What selects nothing is made of itself, and of processes that say so."""
        spec = given.spec
        assert isinstance(spec, r.ServiceEntry)
        if spec.workload_selector is not None:
            return self._entry(given)
        place = (given.namespace, given.name)
        known = self._before._made_of_entries.get(place) if self._before is not None and self._is_quiet else None
        if known is None or known[0] is not given:
            known = (given, tuple(self._entry(given)))
        self._made_of_entries[place] = known
        return known[1]

    def _entry(self, given: r.Object) -> Iterator[Service]:
        spec = given.spec
        assert isinstance(spec, r.ServiceEntry)
        ports = tuple(
            Port(port.number, port.name, port.protocol.upper(), port.target_port or port.number)
            for port in spec.ports
            if port.protocol.upper() != "UDP"
        )
        kind = {
            "NONE": ClusterType.ORIGINAL_DST,
            "STATIC": ClusterType.EDS,
            "DNS": ClusterType.STRICT_DNS,
            "DNS_ROUND_ROBIN": ClusterType.LOGICAL_DNS,
            # A name that is looked up when it is called: that is what going to the named address means in process.
            "DYNAMIC_DNS": ClusterType.ORIGINAL_DST,
        }[spec.resolution]
        selector = (
            spec.workload_selector.labels or spec.workload_selector.match_labels if spec.workload_selector else {}
        )
        for host in spec.hosts:
            host = host.lower().rstrip(".")
            instances: dict[int, tuple[Instance, ...]] = {}
            for port in ports:
                found = [of_entry(entry, entry.labels, port, given.namespace) for entry in spec.endpoints]
                found += self._from_entries(given, selector, port, kind)
                if kind in (ClusterType.STRICT_DNS, ClusterType.LOGICAL_DNS):
                    if not spec.endpoints and not selector:
                        found.append(Instance(Endpoint(host, int(port.target or port.number)), {}))
                    if kind is ClusterType.LOGICAL_DNS:
                        found = found[:1]  # Envoy takes exactly one
                if kind is ClusterType.EDS:
                    for pod in self._pods_by_label.chosen(given.namespace, selector):
                        assert isinstance(pod.spec, r.Pod)
                        if pod.spec.status.pod_ip and is_ready(pod):
                            target = int(port.target or port.number)
                            found.append(self._of_pod(pod.spec.status.pod_ip, target, pod.namespace, pod.name))
                    members = (
                        self._workloads_by_label.chosen(given.namespace, selector)
                        if selector
                        else self._workloads_by_host.get(fqdn(host, given.namespace), ())
                    )
                    found += [instance for w in members if (instance := of_joined(w, port)) is not None]
                instances[port.number] = unique(found)
            yield Service(
                host,
                given.namespace,
                ports,
                "",
                kind,
                tuple(spec.addresses),
                tuple(spec.export_to) or self._export_to,
                tuple(spec.subject_alt_names),
                instances,
            )

    # What runs and has no object: outside Kubernetes nobody writes Services.

    def _implied(self) -> Iterator[Service]:
        for host, joined in self._workloads_by_host.items():
            members = [workload for workload in joined if workload.port and workload.address]
            if host in self._all or not members or members[0].service in self._all:
                continue
            known = self._before._made_of_workloads.get(host) if self._before is not None and self._is_quiet else None
            if known is not None:
                self._made_of_workloads[host] = known
                yield known
                continue
            numbers: dict[int, Port] = {}
            for workload in members:
                for name, number in served(workload):
                    numbers.setdefault(number, Port(number, name, protocol_named(name)))
            ports = tuple(numbers[number] for number in sorted(numbers))
            instances = {
                port.number: unique(
                    of_workload(workload, port.number)
                    for workload in members
                    if any(number == port.number for _, number in served(workload))
                )
                for port in ports
            }
            namespace = members[0].namespace
            short = host.partition(".")[0] if len(names(host, namespace)) > 1 else ""
            found = self._made_of_workloads[host] = Service(host, namespace, ports, short, instances=instances)
            yield found


class _Made(NamedTuple):
    """A service of EndpointSlices. because: all that it is made of, first the Service. pods: those that its endpoints
    name, by namespace and name."""

    because: tuple[object, ...]
    service: Service
    slices: list[r.EndpointSlice]
    pods: frozenset[tuple[str, str]]


_Pods = Mapping[tuple[str, str], r.Object]


def _pods_of(given: Sequence[r.Object], before: Registry | None) -> tuple[_Pods, frozenset[tuple[str, str]]]:
    """By namespace and name, and which of them are new, other or gone."""
    if before is None:
        return {_place(pod): pod for pod in given}, frozenset()
    if are_same(before._pod_list, given):
        return before._pods, frozenset()
    start, end = same_ends(before._pod_list, given)
    old, new = before._pod_list[start : len(before._pod_list) - end], given[start : len(given) - end]
    pods = dict(before._pods)
    for pod in old:
        pods.pop(_place(pod), None)
    pods.update((_place(pod), pod) for pod in new)
    if len(pods) != len(given) or len(before._pods) != len(before._pod_list):  # two of one name: the last one counts
        pods = {_place(pod): pod for pod in given}
        old, new = before._pod_list, given
    places = map(_place, (*old, *new))
    return pods, frozenset(place for place in places if before._pods.get(place) is not pods.get(place))


def _place(given: r.Object) -> tuple[str, str]:
    return (given.namespace, given.name)


def joined_hosts(workloads: Iterable[Workload]) -> frozenset[str]:
    """The services that processes have joined, each by its host; most have no object outside Kubernetes."""
    return frozenset(
        fqdn(each.service, each.namespace) for each in workloads if each.service and each.port and each.address
    )


def _is_same(one: object, two: object) -> bool:
    """Objects are compared as they are, not by what they say: one that was read again may count as another."""
    return one is two or (isinstance(one, Workload | frozenset) and one == two)


class Directory:
    """The services that one namespace sees, by host. before: of the same namespace before a change.

    shape: the very same object for directories that differ at most in who serves the services.
    """

    __slots__ = ("services", "shape")

    def __init__(self, services: Mapping[str, Service], before: Directory | None = None) -> None:
        self.services = services
        is_alike = (
            before is not None
            and len(before.services) == len(services)
            and all(map(Service.is_called_like, before.services.values(), services.values()))
        )
        self.shape: object = before.shape if before is not None and is_alike else object()

    def find(self, host: str, namespace: str) -> Service | None:
        """The service that a rule of `namespace` means by `host`."""
        return self.services.get(fqdn(host, namespace)) or self.services.get(host.lower().rstrip("."))

    def __repr__(self) -> str:
        return f"<Directory {len(self.services)} services>"


def _merged(one: Service, two: Service) -> Service:
    """The ports of both; a port that both have has the endpoints of both."""
    added = tuple(port for port in two.ports if one.port(port.number) is None)
    instances = dict(one.instances)
    for number, found in two.instances.items():
        instances[number] = unique((*instances.get(number, ()), *found))
    return replace(one, ports=one.ports + added, instances=instances)
