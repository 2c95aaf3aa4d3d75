"""Which services are there, on which ports, and who serves them? Kubernetes', ServiceEntries', and those that running
workloads imply.

The registry is the same for every node; what a node may see of it is decided where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from meshlib.istio import resources as r
from meshlib.model import ClusterType, Endpoint, Health, Locality, Workload

DOMAIN = "cluster.local"
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Port:
    """target: the endpoint's port, by number or by the name of a container's port; None is the same number."""

    number: int
    name: str = ""
    protocol: str = "TCP"
    target: int | str | None = None

    @property
    def is_http(self) -> bool:
        """Istio's protocol selection; what does not say is sniffed there and taken for HTTP here, since nothing but
        HTTP clients ask."""
        return self.protocol not in ("UDP", "MONGO", "MYSQL", "REDIS", "TLS")

    @property
    def is_http2(self) -> bool:
        return self.protocol in ("HTTP2", "GRPC", "GRPC-WEB")


@dataclass(frozen=True, slots=True)
class Instance:
    """One endpoint of one port of a service, with the labels that subsets choose by."""

    endpoint: Endpoint
    labels: Labels


@dataclass(frozen=True, slots=True)
class Service:
    """host: `reviews.default.svc.cluster.local`, or a ServiceEntry's host. short: `reviews` for Kubernetes' services,
    which have aliases; "" for others. instances: by port number; none for ORIGINAL_DST."""

    host: str
    namespace: str
    ports: tuple[Port, ...]
    short: str = ""
    type: ClusterType = ClusterType.EDS
    addresses: tuple[str, ...] = ()
    export_to: tuple[str, ...] = ()
    subject_alt_names: tuple[str, ...] = ()
    instances: Mapping[int, tuple[Instance, ...]] = field(default_factory=dict)

    def port(self, number: int) -> Port | None:
        return next((port for port in self.ports if port.number == number), None)

    def aliases(self, namespace: str) -> tuple[str, ...]:
        """The names that a caller in `namespace` may use, longest last."""
        if not self.short:
            return (self.host,)
        qualified = f"{self.short}.{self.namespace}"
        names = (qualified, f"{qualified}.svc", self.host)
        return (self.short, *names) if namespace == self.namespace else names

    def is_visible(self, namespace: str) -> bool:
        return is_exported(self.export_to, self.namespace, namespace)


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
    if "." in host or host == "*" or ":" in host:
        return host
    return f"{host}.{namespace}.svc.{DOMAIN}"


class Registry:
    """Every service, by host. Two that claim one host: the first of the order below has it."""

    def __init__(self, objects: Iterable[r.Object], workloads: Iterable[Workload]) -> None:
        by_kind: dict[str, list[r.Object]] = {}
        for each in objects:
            by_kind.setdefault(each.kind, []).append(each)
        running = sorted(workloads, key=lambda w: (w.namespace, w.service, w.name, w.address, w.port))
        self._pods = {(pod.namespace, pod.name): pod for pod in by_kind.get("Pod", ())}
        self.services: dict[str, Service] = {}
        for each in by_kind.get("Service", ()):
            self._add(self._kubernetes(each, by_kind, running))
        for each in by_kind.get("ServiceEntry", ()):
            for service in self._entry(each, running):
                self._add(service)
        for service in self._implied(running):
            self._add(service)

    def _add(self, service: Service) -> None:
        self.services.setdefault(service.host, service)

    def find(self, host: str, namespace: str) -> Service | None:
        """The service that a rule of `namespace` means by `host`."""
        return self.services.get(fqdn(host, namespace)) or self.services.get(host.lower().rstrip("."))

    # Kubernetes

    def _kubernetes(
        self, given: r.Object, by_kind: Mapping[str, list[r.Object]], running: Iterable[Workload]
    ) -> Service:
        spec = given.spec
        assert isinstance(spec, r.Service)
        ports = tuple(Port(port.port, port.name, _protocol(port), port.target_port) for port in spec.ports)
        external = spec.type == "ExternalName" and spec.external_name
        instances: dict[int, tuple[Instance, ...]] = {}
        joined = [
            workload
            for workload in running
            if workload.namespace == given.namespace and _joins(workload, given.name, spec.selector)
        ]
        for port in ports:
            if external:
                found = [Instance(Endpoint(spec.external_name.rstrip("."), port.number), {})]
            else:
                found = [
                    *self._from_kubernetes(given, spec, port, by_kind),
                    *(instance for w in joined if (instance := _instance(w, port)) is not None),
                ]
            instances[port.number] = _unique(found)
        addresses = () if spec.cluster_ip in ("", "None") else (spec.cluster_ip,)
        annotations = (given.raw.get("metadata") or {}).get("annotations") or {}
        exported = str(annotations.get("networking.istio.io/exportTo", ""))
        return Service(
            fqdn(given.name, given.namespace),
            given.namespace,
            ports,
            given.name,
            ClusterType.STRICT_DNS if external else ClusterType.EDS,
            addresses,
            tuple(part.strip() for part in exported.split(",") if part.strip()),
            (),
            instances,
        )

    def _from_kubernetes(
        self, given: r.Object, spec: r.Service, port: Port, by_kind: Mapping[str, list[r.Object]]
    ) -> Iterator[Instance]:
        """EndpointSlices say it; else Endpoints; else the pods that the selector chooses."""
        slices = [
            each
            for each in by_kind.get("EndpointSlice", ())
            if each.namespace == given.namespace and each.labels.get("kubernetes.io/service-name") == given.name
        ]
        if slices:
            for each in slices:
                assert isinstance(each.spec, r.EndpointSlice)
                yield from self._of_slice(each.spec, each.namespace, port)
            return
        endpoints = [
            each
            for each in by_kind.get("Endpoints", ())
            if each.namespace == given.namespace and each.name == given.name
        ]
        if endpoints:
            for each in endpoints:
                assert isinstance(each.spec, r.Endpoints)
                for subset in each.spec.subsets:
                    for exposed in subset.ports:
                        if exposed.name == port.name or len(subset.ports) == 1:
                            for address in subset.addresses:
                                target = address.target_ref.name if address.target_ref else ""
                                yield self._of_pod(address.ip, exposed.port, given.namespace, target)
            return
        if not spec.selector:
            return
        for pod in by_kind.get("Pod", ()):
            assert isinstance(pod.spec, r.Pod)
            if pod.namespace != given.namespace or not _selects(spec.selector, pod.labels):
                continue
            number = _container_port(pod.spec, port)
            if pod.spec.status.pod_ip and _is_ready(pod.spec) and number is not None:
                yield self._of_pod(pod.spec.status.pod_ip, number, pod.namespace, pod.name)

    def _of_slice(self, spec: r.EndpointSlice, namespace: str, port: Port) -> Iterator[Instance]:
        for exposed in spec.ports:
            if exposed.port is None or (exposed.name != port.name and len(spec.ports) != 1):
                continue
            for endpoint in spec.endpoints:
                conditions = endpoint.conditions
                # Ready unknown is ready (Kubernetes API, EndpointConditions).
                if conditions.ready is False and not (conditions.terminating and conditions.serving):
                    continue
                health = Health.DRAINING if conditions.terminating else Health.HEALTHY
                target = endpoint.target_ref.name if endpoint.target_ref else ""
                for address in endpoint.addresses:
                    yield self._of_pod(address, exposed.port, namespace, target, Locality("", endpoint.zone), health)

    def _of_pod(
        self,
        address: str,
        port: int,
        namespace: str,
        name: str,
        locality: Locality = Locality(),  # noqa: B008 -- frozen
        health: Health = Health.HEALTHY,
    ) -> Instance:
        pod = self._pods.get((namespace, name))
        return Instance(
            Endpoint(address, port, locality=locality, health=health, workload=name), pod.labels if pod else {}
        )

    # ServiceEntry

    def _entry(self, given: r.Object, running: Iterable[Workload]) -> Iterator[Service]:
        spec = given.spec
        assert isinstance(spec, r.ServiceEntry)
        ports = tuple(
            Port(port.number, port.name, port.protocol.upper(), port.target_port or port.number) for port in spec.ports
        )
        kind = {
            "NONE": ClusterType.ORIGINAL_DST,
            "STATIC": ClusterType.EDS,
            "DNS": ClusterType.STRICT_DNS,
            "DNS_ROUND_ROBIN": ClusterType.LOGICAL_DNS,
        }[spec.resolution]
        selector = (
            spec.workload_selector.labels or spec.workload_selector.match_labels if spec.workload_selector else {}
        )
        for host in spec.hosts:
            host = host.lower().rstrip(".")
            instances: dict[int, tuple[Instance, ...]] = {}
            for port in ports:
                found: list[Instance] = []
                for entry in spec.endpoints:
                    target = entry.ports.get(port.name) or int(port.target or port.number)
                    locality = Locality(*(entry.locality.split("/")[:3])) if entry.locality else Locality()
                    found.append(
                        Instance(Endpoint(entry.address, target, max(1, entry.weight), locality), entry.labels)
                    )
                if kind in (ClusterType.STRICT_DNS, ClusterType.LOGICAL_DNS) and not spec.endpoints:
                    found.append(Instance(Endpoint(host, int(port.target or port.number)), {}))
                if selector:
                    for workload in running:
                        if workload.namespace == given.namespace and _selects(selector, dict(workload.labels)):
                            instance = _instance(workload, port)
                            found += [instance] if instance else []
                elif kind is ClusterType.EDS:
                    found += [i for w in running if w.service == host and (i := _instance(w, port)) is not None]
                instances[port.number] = _unique(found)
            yield Service(
                host,
                given.namespace,
                ports,
                "",
                kind,
                tuple(spec.addresses),
                tuple(spec.export_to),
                tuple(spec.subject_alt_names),
                instances,
            )

    # What runs and has no object: outside Kubernetes nobody writes Services.

    def _implied(self, running: Iterable[Workload]) -> Iterator[Service]:
        grouped: dict[tuple[str, str], list[Workload]] = {}
        for workload in running:
            host = fqdn(workload.service, workload.namespace) if workload.service else ""
            if host and workload.port and host not in self.services and workload.service not in self.services:
                grouped.setdefault((workload.namespace, workload.service), []).append(workload)
        for (namespace, name), members in grouped.items():
            numbers: dict[int, Port] = {}
            for workload in members:
                for port_name, number in workload.port_names or (("http", workload.port),):
                    numbers.setdefault(number, Port(number, port_name))
            ports = tuple(numbers[number] for number in sorted(numbers))
            instances = {
                port.number: _unique(
                    Instance(_endpoint(workload, port.number), dict(workload.labels))
                    for workload in members
                    if port.number in {workload.port, *(number for _, number in workload.port_names)}
                )
                for port in ports
            }
            yield Service(fqdn(name, namespace), namespace, ports, name, instances=instances)


def _protocol(port: r.ServicePort) -> str:
    """Istio: appProtocol, else the port name's prefix, else the transport's."""
    if port.protocol == "UDP":
        return "UDP"
    said = (port.app_protocol or port.name).lower()
    if said in ("kubernetes.io/h2c", "grpc-web"):
        return "HTTP2" if said.endswith("h2c") else "GRPC-WEB"
    prefix = said.split("-")[0]
    return prefix.upper() if prefix in ("http", "http2", "https", "grpc", "mongo", "mysql", "redis", "tls") else "TCP"


def _joins(workload: Workload, service: str, selector: Labels) -> bool:
    if workload.service:
        return workload.service == service
    return _selects(selector, dict(workload.labels))


def _selects(selector: Labels, labels: Labels) -> bool:
    """An empty selector selects nothing (a Service's, a ServiceEntry's)."""
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _instance(workload: Workload, port: Port) -> Instance | None:
    number = dict(workload.port_names).get(port.name, workload.port)
    if not workload.address or not number:
        return None
    return Instance(_endpoint(workload, number), dict(workload.labels))


def _endpoint(workload: Workload, port: int) -> Endpoint:
    return Endpoint(workload.address, port, locality=workload.locality, workload=workload.name)


def _container_port(pod: r.Pod, port: Port) -> int | None:
    if port.target is None:
        return port.number
    if isinstance(port.target, int):
        return port.target
    if port.target.isdecimal():
        return int(port.target)
    named = (each for container in pod.spec.containers for each in container.ports if each.name == port.target)
    found = next(named, None)
    return found.container_port if found else None


def _is_ready(pod: r.Pod) -> bool:
    if pod.status.phase in ("Failed", "Succeeded"):
        return False
    ready = next((each for each in pod.status.conditions if each.type == "Ready"), None)
    return ready is None or ready.status == "True"


def _unique(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """By address, in order; one that is registered and in an object counts once."""
    found = {instance.endpoint.authority: instance for instance in instances}
    return tuple(found[key] for key in sorted(found))
