"""Is a DestinationRule about a service that is there, and do its subsets hold anybody? (IST0173, IST0174)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import EMPTY_SUBSET, UNKNOWN_RULE_HOST, Message
from meshlib.istio.analyze.scene import Scene, selector_of
from meshlib.istio.services import fqdn

_OF_NODES = ("topology.kubernetes.io/", "topology.istio.io/", "kubernetes.io/hostname")
"""Labels that a pod has of its node: they stand in no object of the pod."""


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("DestinationRule"):
        spec = each.spec
        assert isinstance(spec, r.DestinationRule)
        if "*" in spec.host:
            continue
        service = scene.service(spec.host, each.namespace)
        if service is None:
            yield UNKNOWN_RULE_HOST.at(each, ("spec", "host"), spec.host)
            continue
        selector = _selector(scene, service.host)
        if selector is None or not scene.is_whole:
            continue  # nobody has said all that runs behind the service
        for index, subset in enumerate(spec.subsets):
            wanted = {key: value for key, value in subset.labels.items() if not key.startswith(_OF_NODES)}
            if not scene.selected({**selector, **wanted}, service.namespace):
                yield EMPTY_SUBSET.at(each, ("spec", "subsets", index), subset.name)


def _selector(scene: Scene, host: str) -> Mapping[str, str] | None:
    """Of the pods behind a host; None where no labels choose them."""
    for each in scene.of("Service"):
        if isinstance(each.spec, r.Service) and fqdn(each.name, each.namespace) == host:
            return each.spec.selector or None
    for each in scene.of("ServiceEntry"):
        if isinstance(each.spec, r.ServiceEntry) and host in each.spec.hosts:
            return selector_of(each.spec.workload_selector) or None
    return None
