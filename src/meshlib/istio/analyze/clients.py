"""Do DestinationRules ask for the mTLS that servers have? (IST0113)

IST0128 and IST0129, "no caCertificates are set", are not told: without them the system's roots are asked here.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import MTLS_CONFLICT, Message
from meshlib.istio.analyze.scene import Scene, full_name
from meshlib.istio.documents import Path
from meshlib.istio.services import Service


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("DestinationRule"):
        spec = each.spec
        assert isinstance(spec, r.DestinationRule)
        if spec.traffic_policy is not None:
            yield from _conflict(scene, each, spec.host, spec.traffic_policy.tls)


def _conflict(scene: Scene, given: r.Object, host: str, tls: r.ClientTLSSettings | None) -> Iterator[Message]:
    if tls is None or tls.mode not in ("DISABLE", "ISTIO_MUTUAL"):
        return
    service = scene.service(host, given.namespace)
    if service is None:
        return
    policy, mode = _in_force(scene, service)
    wants_mtls = tls.mode == "ISTIO_MUTUAL"
    if policy is not None and mode == ("DISABLE" if wants_mtls else "STRICT"):
        path: Path = ("spec", "trafficPolicy", "tls", "mode")
        words = service.host, full_name(given), str(wants_mtls).lower(), full_name(policy), mode
        yield MTLS_CONFLICT.at(given, path, *words)


def _in_force(scene: Scene, service: Service) -> tuple[r.Object | None, str]:
    """The PeerAuthentication of the namespace, else of the mesh: the oldest that says anything. Those with a selector
    are for some of the pods only, so that both may be meant."""
    root = scene.settings.root_namespace
    for namespace in dict.fromkeys((service.namespace, root)):
        policies = [
            each
            for each in scene.of("PeerAuthentication")
            if each.namespace == namespace
            and isinstance(each.spec, r.PeerAuthentication)
            and each.spec.selector is None
        ]
        for each in sorted(policies, key=lambda each: (each.created, each.name)):
            assert isinstance(each.spec, r.PeerAuthentication)
            if each.spec.mtls is not None and each.spec.mtls.mode != "UNSET":
                return each, each.spec.mtls.mode
    return None, ""
