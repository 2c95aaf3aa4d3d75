"""Who serves one port of a service? An endpoint of each thing that says so: a pod, a process that has joined, a
WorkloadEntry.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from meshlib.istio import resources as r
from meshlib.istio.by_label import Labels
from meshlib.model import TLS_MODE, ClusterType, Endpoint, Locality, SpiffeId, Workload, peer_of
from meshlib.model.values import dataclass


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
        HTTP clients ask. That holds for TLS too: the caller is inside it."""
        return self.protocol not in ("UDP", "MONGO", "MYSQL", "REDIS")

    @property
    def is_http2(self) -> bool:
        return self.protocol in ("HTTP2", "GRPC", "GRPC-WEB")


@dataclass(frozen=True, slots=True)
class Instance:
    """One endpoint of one port of a service, with the labels that subsets choose by.

    account: namespace and name of the service account that it runs as, by which callers know it.
    """

    endpoint: Endpoint
    labels: Labels
    account: tuple[str, str] | None = None

    def identities(self, trust_domains: Iterable[str]) -> tuple[str, ...]:
        """Its SPIFFE ID in each of the domains that are the mesh's; none when unknown."""
        if self.account is None:
            return ()
        return tuple(SpiffeId.of(domain, *self.account).uri for domain in trust_domains)


def protocol_of(port: r.ServicePort) -> str:
    """Istio: appProtocol, else the port name's prefix, else the transport's."""
    if port.app_protocol == "kubernetes.io/h2c":
        return "HTTP2"
    return protocol_named(port.app_protocol or port.name)


def protocol_named(name: str) -> str:
    """`grpc-web`, `http-api`, `http`: all before the first dash, but for the protocol that holds one itself."""
    name = name.lower()
    if name == "grpc-web" or name.startswith("grpc-web-"):
        return "GRPC-WEB"
    prefix = name.partition("-")[0]
    return prefix.upper() if prefix in ("http", "http2", "https", "grpc", "mongo", "mysql", "redis", "tls") else "TCP"


def served(workload: Workload) -> tuple[tuple[str, int], ...]:
    """The ports of a workload, by name; the one it did not name is called http."""
    if any(number == workload.port for _, number in workload.port_names):
        return workload.port_names
    return (*workload.port_names, ("http", workload.port))


def of_joined(workload: Workload, port: Port) -> Instance | None:
    """Of a port that the workload names alike, else of its own; None where it serves none."""
    number = dict(workload.port_names).get(port.name, workload.port)
    if not workload.address or not number:
        return None
    return of_workload(workload, number)


def of_workload(workload: Workload, port: int) -> Instance:
    labels = dict(workload.labels)
    endpoint = Endpoint(
        workload.address,
        port,
        locality=workload.locality,
        workload=workload.name,
        peer=peer_of(labels, workload.name, workload.namespace),
        is_meshed=is_meshed(labels),
    )
    return Instance(endpoint, labels, (workload.namespace, workload.service_account))


def is_meshed(labels: Labels) -> bool:
    """Istio's label; our processes bear it while they serve with the mesh's certificate."""
    return labels.get(TLS_MODE) == "istio"


def labels_of_entry(given: r.Object) -> Labels:
    """The object's own labels count as well, and more (serviceentry/conversion.go)."""
    assert isinstance(given.spec, r.WorkloadEntry)
    return {**given.spec.labels, **given.labels}


def of_entry(entry: r.WorkloadEntry, labels: Labels, port: Port, namespace: str, name: str = "") -> Instance:
    """Of a WorkloadEntry, or of one within a ServiceEntry. labels: all that count; name: of the object."""
    wanted = str(port.target)
    target = entry.ports.get(port.name) or (int(wanted) if wanted.isdecimal() else port.number)
    locality = Locality(*(entry.locality.split("/")[:3])) if entry.locality else Locality()
    endpoint = Endpoint(
        entry.address, target, max(1, entry.weight), locality, workload=name, is_meshed=is_meshed(labels)
    )
    return Instance(endpoint, labels, (namespace, entry.service_account) if entry.service_account else None)


def why_left_out(address: str, kind: ClusterType) -> str:
    """Why an endpoint can't be called from here; "" where it can."""
    if not address:
        return "is missing: the gateway of its network is not known here"
    if address.startswith("unix://"):
        return "is a socket of its own machine, which nobody else reaches"
    if kind is ClusterType.EDS and not _is_address(address):
        return "is a name where IP addresses are wanted (resolution DNS wants names)"
    return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def locality_of_node(labels: Labels) -> Locality | None:
    place = tuple(labels.get(name, "") for name in r.TOPOLOGY_LABELS)
    return Locality(*place) if any(place) else None


def of_one_family(slices: list[r.EndpointSlice], families: list[str]) -> list[r.EndpointSlice]:
    """The pods of a dual-stack service stand in slices of both families, and would count twice: those of its first
    family are taken, unless there are none."""
    first = families[0] if families else "IPv4"
    preferred = [each for each in slices if each.address_type == first]
    return preferred if any(each.endpoints for each in preferred) else slices


def container_port(pod: r.Pod, port: Port) -> int | None:
    """What the pod listens on for this port of a service; None where it has no port of the name that is asked for."""
    if port.target is None:
        return port.number
    if isinstance(port.target, int):
        return port.target
    if port.target.isdecimal():
        return int(port.target)
    named = (each for container in pod.spec.containers for each in container.ports if each.name == port.target)
    found = next(named, None)
    return found.container_port if found else None


def is_ready(given: r.Object) -> bool:
    """Whether a pod may be called: as its probes say, and neither over nor being deleted."""
    pod = given.spec
    assert isinstance(pod, r.Pod)
    is_leaving = (given.raw.get("metadata") or {}).get("deletionTimestamp") is not None
    if is_leaving or pod.status.phase in ("Failed", "Succeeded"):
        return False
    ready = next((each for each in pod.status.conditions if each.type == "Ready"), None)
    return ready is None or ready.status == "True"


def unique(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """By address, in order; one that is registered and in an object counts once."""
    found = {instance.endpoint.authority: instance for instance in instances}
    return tuple(found[key] for key in sorted(found))
