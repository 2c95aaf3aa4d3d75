"""How is the control plane itself, and where are its processes scraped? `/metrics` with istiod's names, and Prometheus'
HTTP service discovery.

Names without `_total` are Istio's: its dashboards ask for them so.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.gate import admission_of
from meshlib.version import __version__

CONVERGENCE_BUCKETS = (0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0)
"""Seconds; istiod's."""
METRICS_PATH = "/stats/prometheus"


class State(NamedTuple):
    """What is read at each scrape. problems: by level. root_expires: seconds since 1970; 0 where there is no CA."""

    clients: Iterable[api.Client]
    services: int
    objects: Mapping[str, int]
    problems: Mapping[str, int]
    root_expires: float


class OwnMetrics(Collector):
    """Counters belong to the event loop; `state` is asked on it, at a scrape."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state
        self._pushes: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter()
        self._asked = self._given = 0
        self._registry = CollectorRegistry()
        self._convergence = Histogram(
            "pilot_proxy_convergence_time",
            "Seconds from a change of the configuration until a client had accepted all of it.",
            buckets=CONVERGENCE_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def pushed(self, type_name: str) -> None:
        """An answer of this type (`CDS`) was sent."""
        self._pushes[type_name.lower()] += 1

    def rejected(self, type_name: str) -> None:
        self._rejects[type_name.lower()] += 1

    def converged(self, changed: float) -> None:
        """A client has accepted all that has changed. changed: monotonic seconds, when it did."""
        self._convergence.observe(max(0.0, time.monotonic() - changed))

    def certificate_asked(self) -> None:
        self._asked += 1

    def certificate_given(self) -> None:
        self._given += 1

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        clients = list(state.clients)
        yield _gauge("pilot_info", "This control plane.", {("version", __version__): 1})
        yield _gauge(
            "pilot_xds",
            "Connected clients, by their version.",
            {("version", agent): count for agent, count in Counter(each.user_agent for each in clients).items()},
        )
        states = Counter(status.lower().replace(" ", "_") for each in clients for status in each.types.values())
        yield _gauge(
            "meshlib_xds_subscriptions",
            "Types that clients have asked for, by whether they have accepted the last answer.",
            {("state", name): count for name, count in states.items()},
        )
        yield _untyped("pilot_xds_pushes", "Answers that were sent.", "type", self._pushes)
        yield _untyped("pilot_total_xds_rejects", "Answers that a client refused.", "type", self._rejects)
        yield GaugeMetricFamily("pilot_services", "Services that are known.", state.services)
        yield GaugeMetricFamily(
            "pilot_virt_services", "Virtual services in force.", state.objects.get("VirtualService", 0)
        )
        yield _gauge(
            "meshlib_objects", "Objects in force.", {("kind", kind): count for kind, count in state.objects.items()}
        )
        yield _gauge(
            "meshlib_configuration_problems",
            "What `meshctl problems` lists.",
            {("level", level): state.problems.get(level, 0) for level in ("error", "warning")},
        )
        yield _untyped("citadel_server_csr_count", "Certificates that were asked for.", "", {"": self._asked})
        yield _untyped(
            "citadel_server_success_cert_issuance_count", "Certificates that were given.", "", {"": self._given}
        )
        if state.root_expires:
            yield GaugeMetricFamily(
                "citadel_server_root_cert_expiry_timestamp",
                "When the root certificate expires, in seconds since 1970.",
                state.root_expires,
            )

    def routes(self) -> list[Route]:
        return [self.route(), Route("/sd/prometheus", self._targets)]

    def route(self) -> Route:
        """The metrics alone."""
        return Route("/metrics", self._metrics)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _targets(self, request: Request) -> Response:
        powers = admission_of(request).powers
        seen = [each for each in self._state().clients if powers.sees(each.namespace)]
        return Response(msgspec.json.encode(targets(seen)), media_type="application/json")


def targets(clients: Iterable[api.Client]) -> list[dict[str, Any]]:
    """Prometheus' http_sd format. Processes that share a port (a server's workers) are one target."""
    found: dict[str, dict[str, Any]] = {}
    for client in sorted(clients, key=lambda each: each.name):
        if client.metrics and client.metrics not in found:
            found[client.metrics] = {
                "targets": [client.metrics],
                "labels": {
                    "__metrics_path__": METRICS_PATH,
                    "namespace": client.namespace,
                    "workload": client.workload,
                    "service": client.service,
                    "pod": client.name.rpartition(".")[0] or client.name,
                },
            }
    return list(found.values())


def scraped_at(address: str, port: int, peer: str) -> str:
    """`10.0.0.1:15090`, "" where nobody is scraped. peer: gRPC's `ipv4:10.0.0.1:4711`, for who serves nothing and so
    has told no address."""
    host = address or peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return ""
    return "" if not port else f"[{found}]:{port}" if found.version == 6 else f"{found}:{port}"


def _gauge(name: str, told: str, values: Mapping[tuple[str, str], float]) -> Metric:
    label = next((key[0] for key in values), "")
    family = GaugeMetricFamily(name, told, labels=[label] if label else [])
    for (_, value), count in values.items():
        family.add_metric([value], count)
    return family


def _untyped(name: str, told: str, label: str, values: Mapping[str, float]) -> Metric:
    """A counter by Istio's name; with a type, Prometheus' library would end it in `_total`."""
    family = Metric(name, told, "unknown")
    for value, count in values.items():
        family.add_sample(name, {label: value} if label else {}, count)
    return family
