"""Which objects have a say in what happens to a service, or to a workload? By host, by name, by selector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meshlib.istio import resources as r
from meshlib.istio.services import fqdn
from meshlib.istio.targets import is_service, targets

_ROUTES = ("HTTPRoute", "GRPCRoute")
_SELECTING = (
    r.PeerAuthentication,
    r.RequestAuthentication,
    r.AuthorizationPolicy,
    r.RateLimitPolicy,
    r.Telemetry,
    r.Sidecar,
)


class Concerned:
    """hosts, names: of the services. labels: of the workloads, by which they are selected; several may differ."""

    def __init__(
        self,
        namespace: str,
        hosts: frozenset[str],
        names: frozenset[str],
        labels: tuple[Mapping[str, str], ...],
        root: str,
    ) -> None:
        self._namespace, self._hosts, self._names, self._labels, self._root = namespace, hosts, names, labels, root

    def by(self, given: r.Object) -> bool:
        spec: Any = given.spec
        if isinstance(spec, r.VirtualService):
            destinations = [to.destination.host for rule in spec.http for to in rule.route]
            return any(self._is_host(host, given.namespace) for host in (*spec.hosts, *destinations))
        if isinstance(spec, r.DestinationRule | r.BackendTrafficPolicy):
            return self._is_host(spec.host, given.namespace)
        if isinstance(spec, r.ServiceEntry):
            return any(self._is_host(host, given.namespace) for host in spec.hosts)
        if isinstance(spec, r.Service):
            return given.namespace == self._namespace and given.name in self._names
        if given.kind in _ROUTES:
            return any(self._is_named(ref, given.namespace) for ref in _refs(given.raw.get("spec")))
        if not isinstance(spec, _SELECTING):
            return False
        if named := targets(spec):
            return given.namespace == self._namespace and any(is_service(e) and e.name in self._names for e in named)
        if given.namespace not in (self._root, self._namespace):
            return False
        selector = getattr(spec, "selector", None) or getattr(spec, "workload_selector", None)
        wanted = {**selector.match_labels, **selector.labels} if selector is not None else {}
        if not wanted:
            return True
        return any(wanted.items() <= dict(labels).items() for labels in self._labels)

    def _is_host(self, host: str, namespace: str) -> bool:
        if host.startswith("*."):
            return any(each.endswith(host[1:]) for each in self._hosts)
        return host != "*" and fqdn(host, namespace) in self._hosts

    def _is_named(self, ref: Mapping[str, Any], namespace: str) -> bool:
        there = ref.get("namespace", namespace)
        return ref.get("kind", "Service") == "Service" and there == self._namespace and ref.get("name") in self._names


def _refs(spec: Any) -> Iterator[Mapping[str, Any]]:
    """parentRefs without a kind are Gateways; backendRefs without one are Services."""
    if not isinstance(spec, Mapping):
        return
    yield from ({"kind": "Gateway", **each} for each in spec.get("parentRefs") or ())
    for rule in spec.get("rules") or ():
        yield from rule.get("backendRefs") or ()
