"""Does a real Jaeger show a page of Bookinfo as one trace? The demo's processes push to its OTLP receiver, and its
query API gives the trace back, hop below hop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from e2e.test_demo import Demo
from observability.watched_demo import BUILT, DENIED, demo_process, eventually, log_of, program
from peers import unused_port

PROGRAM = BUILT / "jaeger"
pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not PROGRAM.exists(), reason="there is no Jaeger here: make test-jaeger builds it (needs Go)"),
]
VISITOR = "00f067aa0ba902b7"
"""The span that the visitor says to be in."""
Tree = tuple[str, str, tuple["Tree", ...]]
"""Service, kind of span, and what is below it."""


class Jaeger(NamedTuple):
    """url: of its query API. demo: which pushes to it."""

    url: str
    demo: Demo

    def ask(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/{path}", params=params, trust_env=False, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def trace(self, trace_id: str, service: str, spans: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
        """Once it has as many spans. service: of which it has one then."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [
                each for each in self.ask("traces", service=service, limit="500") if each["traceID"] == trace_id
            ]
            return bool(found) and len(found[0]["spans"]) >= spans(found[0])

        eventually(is_there, lambda: f"the trace {trace_id} is not whole: {found}")
        return found[0]


def configuration(otlp: int, query: int, grpc: int) -> dict[str, Any]:
    """Memory, an OTLP receiver and the query API; as Jaeger's own all-in-one, without what is not asked here."""
    return {
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query"],
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
            "telemetry": {"metrics": {"level": "none"}},
        },
        "extensions": {
            "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 10000}}}},
            "jaeger_query": {
                "storage": {"traces": "memory"},
                "http": {"endpoint": f"127.0.0.1:{query}"},
                "grpc": {"endpoint": f"127.0.0.1:{grpc}"},
            },
        },
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": f"127.0.0.1:{otlp}"}}}},
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
    }


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    folder: Path = tmp_path_factory.mktemp("jaeger")
    otlp, query, grpc = unused_port(), unused_port(), unused_port()
    (folder / "jaeger.yaml").write_text(yaml.safe_dump(configuration(otlp, query, grpc)))
    url = f"http://127.0.0.1:{query}"

    def is_up() -> bool:
        assert process.poll() is None, log_of(folder, "jaeger")
        try:
            return httpx.get(f"{url}/api/services", trust_env=False, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    its_own = {"OTEL_TRACES_SAMPLER": "always_off"}  # spans of itself, to whatever may listen on OTLP's port
    with program(folder, "jaeger", "--config", str(folder / "jaeger.yaml"), **its_own) as process:
        eventually(is_up, lambda: f"Jaeger does not come up:\n{log_of(folder, 'jaeger')}")
        with demo_process(folder, MESHLIB_TELEMETRY=f"http://127.0.0.1:{otlp}") as demo:
            yield Jaeger(url, demo)


def tree(trace: dict[str, Any]) -> Tree:
    """From the one span that is the visitor's child; every other one is below it."""
    below: dict[str, list[dict[str, Any]]] = {}
    for span in trace["spans"]:
        [parent] = [each["spanID"] for each in span["references"] if each["refType"] == "CHILD_OF"]
        below.setdefault(parent, []).append(span)

    def of(span: dict[str, Any]) -> Tree:
        children = sorted(of(each) for each in below.pop(span["spanID"], ()))
        return trace["processes"][span["processID"]]["serviceName"], tags(span)["span.kind"], tuple(children)

    [root] = below.pop(VISITOR)
    found = of(root)
    assert not below, "spans beside the tree"
    return found


def version_of_reviews(trace: dict[str, Any]) -> str:
    [version] = {
        tags(each)["istio.canonical_revision"]
        for each in trace["spans"]
        if tags(each)["istio.canonical_service"] == "reviews"
    }
    return str(version)


def tags(span: dict[str, Any]) -> dict[str, Any]:
    return {each["key"]: each["value"] for each in span["tags"]}


def test_a_page_is_one_trace_with_every_hop(jaeger: Jaeger) -> None:
    """Of the trace that the visitor began: no hop stands beside it, and each says who it is in Istio's words."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    page = httpx.get(
        jaeger.demo.page, headers={"traceparent": f"00-{trace_id}-{VISITOR}-01"}, trust_env=False, timeout=30
    )
    assert page.status_code == 200

    def spans(trace: dict[str, Any]) -> int:
        """Two of the gateway, three of productpage, one each of details and reviews; reviews v2 and v3 ask ratings."""
        return 7 if version_of_reviews(trace) == "v1" else 9

    trace = jaeger.trace(trace_id, "reviews", spans)
    version = version_of_reviews(trace)
    asked = () if version == "v1" else (("reviews", "client", (("ratings", "server", ()),)),)
    calls = (
        ("productpage", "client", (("details", "server", ()),)),
        ("productpage", "client", (("reviews", "server", asked),)),
    )
    gateway, kind, below = tree(trace)
    assert (kind, below) == ("server", ((gateway, "client", (("productpage", "server", calls),)),))
    for span in trace["spans"]:
        told, by = tags(span), trace["processes"][span["processID"]]["serviceName"]
        assert told["node_id"].startswith("router~" if by == gateway else "sidecar~")
        # The visitor alone has no certificate.
        assert told["mesh.mtls"] is not (by == gateway and told["span.kind"] == "server")


def test_what_is_refused_is_an_error_on_its_way(jaeger: Jaeger) -> None:
    """Jaeger marks the caller's span; the server did as it was told."""
    trace_id = "5bf92f3577b34da6a3ce929d0e0e4736"
    with httpx.Client(trust_env=False, timeout=30, base_url=jaeger.demo.page.removesuffix("/productpage")) as http:
        assert http.get(DENIED, headers={"traceparent": f"00-{trace_id}-{VISITOR}-01"}).status_code == 403
    trace = jaeger.trace(trace_id, "details", lambda _: 5)
    told = {
        (trace["processes"][each["processID"]]["serviceName"], tags(each)["span.kind"]): tags(each)
        for each in trace["spans"]
    }
    assert told["productpage", "client"]["error"] is True
    assert told["productpage", "client"]["error.type"] == "403"
    assert told["details", "server"]["http.response.status_code"] == 403
    assert "error" not in told["details", "server"]


def test_services_and_operations_are_found_by_name(jaeger: Jaeger) -> None:
    """What the search form offers."""
    httpx.get(jaeger.demo.page, trust_env=False, timeout=30)
    wanted = {"productpage", "details", "reviews"}
    eventually(lambda: wanted <= set(jaeger.ask("services")), lambda: str(jaeger.ask("services")))
    assert jaeger.ask("services/details/operations")
