"""Does the page say why a call went where it did, and what the mesh took of its time? In a real headless Chromium."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright.sync_api")
from axe_playwright_python.sync_playwright import Axe
from pictured_town import CHROMIUM, Town, traffic

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    # Playwright's driver leaves its loop to the collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]
TRACE, CALL, SERVED = "cd" * 16, "0a" * 8, "0d" * 8
TRIES = ("0b" * 8, "0c" * 8)


def tried_twice(town: Town) -> None:
    """A call of productpage: a delay is injected, v2 refuses, and the second try is answered."""
    now, caller = time.time() - 5, "productpage.default"
    at = {"service.namespace": "default", "istio.workload": "productpage-v1"}
    cluster = {"mesh.cluster": "outbound|9080|v2|reviews.default.svc.cluster.local"}
    attributes = {
        CALL: {
            **at,
            **cluster,
            "mesh.attempts": "2",
            "mesh.route": "default",
            "mesh.object": "VirtualService default/reviews (virtual-service-all-v1.yaml:15)",
            "mesh.endpoint": "10.0.0.2:9080",
            "mesh.response_flags": "DI",
            "mesh.fault": "delay",
        },
        TRIES[0]: {**at, **cluster, "mesh.attempt": "1", "mesh.endpoint": "10.0.0.1:9080"},
        TRIES[1]: {
            **at,
            **cluster,
            "mesh.attempt": "2",
            "mesh.endpoint": "10.0.0.2:9080",
            "http.response.status_code": "200",
        },
        SERVED: {"service.namespace": "default", "istio.workload": "reviews-v2"},
    }
    town.push_spans(
        (caller, CALL, "", now, 1.0, False),
        (caller, TRIES[0], CALL, now + 0.5, 0.1, True),
        (caller, TRIES[1], CALL, now + 0.6, 0.2, False),
        ("reviews.default", SERVED, TRIES[1], now + 0.61, 0.184, False),
        trace=TRACE,
        attributes=attributes,
        servers={SERVED},
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_call_says_what_the_mesh_decided(page: Any, town: Town, theme: str) -> None:
    """The object with its file, the fault, the place, each try; and the object is one key away."""
    tried_twice(town)
    page.goto(f"{town.url}/#view=traces&trace={TRACE}&theme={theme}")
    page.get_by_test_id("waterfall").get_by_role("button", name="productpage.default").first.focus()
    page.keyboard.press("Enter")
    decided = page.get_by_test_id("decision")
    for told in (
        "The route default was the first that matched: VirtualService default/reviews (virtual-service-all-v1.yaml:15)",
        "A fault was injected: delay",
        "reviews.default.svc.cluster.local:9080, subset v2",
        "picked 10.0.0.2:9080 in the end",
        "Try 1: 10.0.0.1:9080 answered nothing",
        "Try 2: 10.0.0.2:9080 answered 200",
        "DI: delayed by an injected fault",
    ):
        decided.filter(has_text=told).wait_for()
    assert Axe().run(page).response["violations"] == []
    decided.get_by_role("button", name="VirtualService default/reviews").focus()
    page.keyboard.press("Enter")
    page.locator("details[open] pre").filter(has_text="subset: v1").wait_for()


def test_an_edge_says_what_is_lost_on_the_way(page: Any, town: Town) -> None:
    """200 ms of the try that was answered, 184 of which the server had."""
    traffic(town)
    tried_twice(town)
    for source, target in (
        ("workload:default/productpage-v1", "service:default/reviews"),
        ("service:default/reviews", "workload:default/reviews-v2"),
    ):
        page.goto(f"{town.url}/#seconds=300&selected={source}%3E{target}%3Ehttp")
        page.get_by_test_id("overhead").filter(has_text="16 ms / 16 ms of 1 traced call:").wait_for()
    query = {"source": "workload:default/productpage-v1", "target": "service:default/details"}
    found = httpx.get(f"{town.url}/v1/overhead", params=query, trust_env=False, timeout=20)
    assert found.json() == {"calls": 0, "p50": None, "p95": None}
