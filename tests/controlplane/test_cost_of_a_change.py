"""Does a change cost what has changed, however much there is? Counted, not timed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from meshlib.controlplane import cache as cache_module
from meshlib.controlplane.cache import Cache
from meshlib.istio import translate, world
from meshlib.istio.parse import parse_text
from meshlib.istio.resources import Object
from meshlib.istio.services import Registry
from meshlib.model import Node, Workload

NODE = Node("caller", Workload("caller"))


def service(name: str) -> dict[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"name": "http", "port": 80}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def endpoint_slice(name: str, host: int) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [f"10.0.0.{host}"], "targetRef": {"kind": "Pod", "name": f"{name}-pod"}}],
    }


def pod(name: str, host: int) -> dict[str, Any]:
    metadata = {"name": f"{name}-pod", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"podIP": f"10.0.0.{host}"}}


def entry(name: str, host: int) -> dict[str, Any]:
    ports = [{"number": 80, "name": "http", "protocol": "HTTP"}]
    spec = {"hosts": [f"{name}.com"], "resolution": "STATIC", "ports": ports}
    spec["endpoints"] = [{"address": f"10.1.0.{host}"}]
    return {"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": name}, "spec": spec}


def read(*given: dict[str, Any]) -> list[Object]:
    found = []
    for each in given:
        parsed = parse_text(json.dumps(each), "test.yaml")
        assert not parsed.problems
        found += parsed.objects
    return found


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of what makes a service, its clusters, its route and the bytes of a resource."""
    counted: Counter[str] = Counter()

    def count(where: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(where, name)

        def counts(*args: Any, **more: Any) -> Any:
            counted[name] += 1
            return real(*args, **more)

        monkeypatch.setattr(where, name, counts)

    for where, name in (
        (Registry, "_kubernetes"),
        (Registry, "_reasons"),
        (Registry, "_entry"),
        (world, "Rulebook"),
        (world, "clusters_of"),
        (translate, "default_route"),
        (translate, "inbound_of"),
        (cache_module, "encode_resource"),
    ):
        count(where, name)
    return counted


async def cost(monkeypatch: pytest.MonkeyPatch, services: int, change: Callable[[int], list[Object]]) -> Counter[str]:
    """Of one change among so many services, half of them ServiceEntries."""
    names = [f"s{number}" for number in range(services // 2)]
    known = {each.key: each for name in names for each in read(service(name), endpoint_slice(name, 1), pod(name, 1))}
    known |= {each.key: each for name in names for each in read(entry(name, 1))}
    views = Cache()
    await views.update(tuple(known.values()), (), [NODE])
    for host in (2, 3):
        known |= {each.key: each for each in change(host)}
        with monkeypatch.context() as patch:
            counted = counting(patch)
            before = await views.view(NODE)
            await views.update(tuple(known.values()), (), [NODE])
            assert sum(len(each.names) for each in (await views.view(NODE)).changes_since(before).values()) == 1
    return counted


@pytest.mark.parametrize(
    "change",
    [
        lambda host: read(endpoint_slice("s7", host)),
        lambda host: read(endpoint_slice("s7", host), pod("s7", host)),
        lambda host: read(entry("s7", host)),
    ],
    ids=["a slice", "a slice and its pod", "a ServiceEntry"],
)
async def test_one_endpoint_costs_the_same_among_a_hundred_services_and_among_a_thousand(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int], list[Object]]
) -> None:
    few, many = await cost(monkeypatch, 100, change), await cost(monkeypatch, 1000, change)
    assert few == many
    assert few["clusters_of"] == 1
    assert few["encode_resource"] <= 2
    assert few["Rulebook"] == few["default_route"] == few["inbound_of"] == 0
