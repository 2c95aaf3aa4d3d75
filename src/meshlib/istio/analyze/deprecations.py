"""Is a field used that Istio would rather see gone? (IST0002)"""

from __future__ import annotations

from collections.abc import Iterator

from meshlib.istio import resources as r
from meshlib.istio.analyze.messages import DEPRECATED, Message
from meshlib.istio.analyze.scene import Scene
from meshlib.istio.documents import Path


def check(scene: Scene) -> Iterator[Message]:
    for each in scene.of("VirtualService"):
        assert isinstance(each.spec, r.VirtualService)
        for index, rule in enumerate(each.spec.http):
            if rule.fault is not None and rule.fault.delay is not None and rule.fault.delay.percent:
                path: Path = ("spec", "http", index, "fault", "delay", "percent")
                told = "HTTPRoute.fault.delay.percent is deprecated; use HTTPRoute.fault.delay.percentage"
                yield DEPRECATED.at(each, path, told)
    for each in scene.of("Sidecar"):
        assert isinstance(each.spec, r.Sidecar)
        policy = each.spec.outbound_traffic_policy
        if policy is not None and policy.egress_proxy is not None:
            path = ("spec", "outboundTrafficPolicy", "egressProxy")
            yield DEPRECATED.at(each, path, "OutboundTrafficPolicy.EgressProxy ignored")
