"""Do the dashboards show something? Every expression of ours, and of Istio's for services, workloads and the mesh,
asked of a real Prometheus that scrapes Bookinfo. Grafana itself is not run: what it would ask is."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from observability.watched_demo import Visitors, demo_process, eventually, scraped
from telemetry.test_real_prometheus import PROMETHEUS, Prometheus

ISTIOS = Path(os.environ.get("MESHLIB_TEST_DASHBOARDS", "nowhere"))
"""A folder with Istio's dashboards."""
pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian package prometheus)"),
    pytest.mark.skipif(not ISTIOS.is_dir(), reason="Istio's dashboards are brought by make test-dashboards (needs Go)"),
]
ROOT = Path(__file__).parents[2]
OURS = ROOT / "deploy" / "observability" / "grafana-mesh.json"
VARIABLES = {
    "$__rate_interval": "30s",
    "$service": "details.default.svc.cluster.local",
    "$qrep": "source|destination",
    "$reporter": "destination",
    "$namespace": "default",
    "$workload": "productpage-v1",
    **dict.fromkeys(("$srcns", "$srcwl", "$dstns", "$dstwl", "$dstsvc"), ".*"),
}
QUIET = re.compile(
    "meshlib_(retries|overflows|endpoints_ejected|breaker_open|rate_limit|quota)|xds_rejects|convergence|flags!="
)
"""What of ours has something to show when something is amiss, is limited, or changes."""
NONE_OF = re.compile(r'istio_tcp_|connection_security_policy!="mutual_tls"|_principal!~"spiffe')
"""What of Istio's is about TCP, for which there is no proxy, or about plaintext, of which there is none in the demo."""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("dashboards")
    with demo_process(folder) as demo, scraped(folder, demo) as asked, Visitors(demo.page, 5.0):
        began = time.monotonic()
        eventually(
            lambda: time.monotonic() - began > 20 and asked.value("sum(rate(istio_requests_total[30s]))") > 5,
            lambda: "no rates",
        )
        yield asked


def panels(given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for each in given.get("panels", ()):
        yield each
        yield from panels(each)


def expressions(dashboard: Path) -> Iterator[tuple[str, str]]:
    """(title of the panel, expression with its variables filled in)."""
    for panel in panels(json.loads(dashboard.read_text())):
        for target in panel.get("targets", ()):
            if "expr" in target:
                yield panel.get("title", ""), filled(target["expr"])


def filled(text: str) -> str:
    for name, value in VARIABLES.items():
        text = re.sub(re.escape(name) + r"\b", lambda _, value=value: value, text)  # type: ignore[misc]
    assert "$" not in text, text
    return text


def empty(asked: Prometheus, given: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that stay without a value though there is traffic; a rate of the last two samples may be one of none."""
    found = list(given)

    def is_shown(text: str) -> bool:
        return any(each["value"][1] != "NaN" for each in asked.query(text))

    deadline = time.monotonic() + 30
    while found and time.monotonic() < deadline:
        found = [(title, text) for title, text in found if not is_shown(text)]
    return found


def test_every_panel_of_ours_shows_what_happens(prometheus: Prometheus) -> None:
    """All but those that wait for something to go wrong."""
    found = [each for each in expressions(OURS) if not QUIET.search(each[1])]
    assert len(found) >= 10
    assert empty(prometheus, found) == []


@pytest.mark.parametrize(
    ("name", "number"), [("service-dashboard", 38), ("workload-dashboard", 30), ("mesh-dashboard.gen", 8)]
)
def test_istios_dashboards_show_all_but_tcp_and_plaintext(prometheus: Prometheus, name: str, number: int) -> None:
    """Of each pair of lines, with mutual TLS and without, it is the one that is true; at the caller's side as well,
    where Istio's proxies do not know. number: of those that have to be there."""
    everything = list(expressions(ISTIOS / f"istio-{name}.json"))
    about = [each for each in everything if not NONE_OF.search(each[1].partition(" or ")[0])]
    assert len(about) >= number
    assert empty(prometheus, about) == []
    plaintext = [each for each in everything if NONE_OF.search(each[1]) and " or " not in each[1]]
    assert not [text for _, text in plaintext if prometheus.query(text)]
