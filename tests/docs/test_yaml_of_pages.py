"""Is the YAML of the pages what the code reads, and does the BackendTrafficPolicy page say what the code does?"""

from __future__ import annotations

import re

import msgspec
import pytest
from pages import ROOT, blocks
from test_istio_reference import fields

from meshlib.istio import resources
from meshlib.istio.clusters import Rules, clusters_of
from meshlib.istio.instances import Port
from meshlib.istio.mesh_settings import MeshSettings
from meshlib.istio.parse import parse_text
from meshlib.istio.services import Service

OWN_PAGE = ROOT / "docs" / "reference" / "backend-traffic-policy.md"
# How-to control-plane shows a mistake on purpose; test_documentation.py holds what is said of it.
# What how-to kubernetes shows is the cluster's; tests/controlplane hold it.
ELSEWHERE = ("control-plane.md", "kubernetes.md")
YAML = [block for block in blocks("yaml") if "docs" in block.page.parts and block.page.name not in ELSEWHERE]


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.id)
def test_the_yaml_of_a_page_is_read_without_a_complaint(block: object) -> None:
    """No problem and no warning: whoever copies it gets what the page promises."""
    parsed = parse_text(block.text, "page.yaml")  # type: ignore[attr-defined]
    assert parsed.objects
    assert (parsed.problems, parsed.warnings) == ((), ())


def test_every_field_of_the_own_kind_has_a_row() -> None:
    """By itself or in the row of what holds it; and no row is about a field that does not exist."""
    rows = re.findall(r"^\| (`.+?`) \|", OWN_PAGE.read_text(), re.MULTILINE)
    said = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    known = [name for name, _ in fields(resources.BackendTrafficPolicy)]
    assert len(said) == len(set(said))
    assert set(said) <= set(known)
    text = OWN_PAGE.read_text()
    for name in known:
        above = name.rpartition(".")[0]
        in_holders_row = above in said and f"`{name.rpartition('.')[2]}" in text
        assert name in said or in_holders_row or any(other.startswith(f"{name}.") for other in said), name


def test_the_example_of_the_own_kind_means_what_it_says() -> None:
    """And the defaults are those of the table."""
    (block,) = (each for each in YAML if each.page == OWN_PAGE)
    (policy,) = parse_text(block.text, "page.yaml").objects
    service = Service("reviews.default.svc.cluster.local", "default", (Port(9080, "http", "HTTP"),))
    (made,) = clusters_of(service, Rules((), (policy,), MeshSettings()))
    cluster = made.cluster
    assert cluster.breaker is not None
    assert (cluster.breaker.failure_rate, cluster.breaker.minimum_calls, cluster.breaker.open_for) == (50, 20, 10)
    assert (cluster.breaker.window, cluster.breaker.probes) == (10, 1)
    assert cluster.load_balancing == "PEAK_EWMA"
    assert cluster.health_checks[0].expected_statuses == ((200, 299),)
    assert (cluster.health_checks[0].timeout, cluster.health_checks[0].unhealthy_threshold) == (1, 3)
    assert cluster.outlier_detection is not None
    assert (cluster.outlier_detection.consecutive_5xx, cluster.outlier_detection.failure_percentage_threshold) == (
        5,
        85,
    )
    assert cluster.shadow == {"breaker"}
    assert msgspec.to_builtins(policy.spec.hedge, enc_hook=lambda duration: duration.seconds) == {  # type: ignore[union-attr]
        "delay": 0.3
    }
