"""Does the page show what has happened, and do what it is told? In a real headless Chromium."""

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
REVIEWS_RULE = "VirtualService default/reviews"


def test_the_graph_is_what_was_pushed(page: Any, town: Town) -> None:
    """Nodes, edges, rates, errors, mutual TLS; with the service between its callers and its versions."""
    page.goto(f"{town.url}/#seconds=60")
    page.get_by_test_id("empty").wait_for()
    page.get_by_test_id("empty").filter(has_text="no telemetry").wait_for()
    traffic(town)
    edge = page.get_by_test_id("edge:default/reviews>default/reviews-v2")
    edge.wait_for(state="attached")
    assert float(edge.get_attribute("data-rps")) == pytest.approx(0.5, rel=0.1)
    assert float(edge.get_attribute("data-err")) == pytest.approx(1 / 6, abs=0.01)
    assert (edge.get_attribute("data-health"), edge.get_attribute("data-mtls")) == ("failure", "0")
    good = page.get_by_test_id("edge:default/productpage-v1>default/details")
    assert float(good.get_attribute("data-rps")) == pytest.approx(1.0, rel=0.1)
    assert (good.get_attribute("data-health"), good.get_attribute("data-mtls")) == ("healthy", "1")
    assert page.locator("g.node").count() == 10
    assert page.get_by_test_id("node:default/reviews").get_attribute("data-kind") == "service"


def test_what_is_clicked_is_explained_and_can_be_linked_to(page: Any, town: Town) -> None:
    """By keyboard, too; the URL is the whole state."""
    traffic(town)
    page.goto(f"{town.url}/#seconds=300")
    node = page.get_by_test_id("node:default/reviews")
    node.focus()
    page.keyboard.press("Enter")
    panel = page.get_by_test_id("panel")
    panel.filter(has_text="virtual service").wait_for()
    assert "selected=service" in page.url
    page.reload()
    panel.wait_for()
    page.keyboard.press("Escape")
    panel.wait_for(state="detached")


def test_a_service_can_have_the_whole_page(page: Any, town: Town) -> None:
    """With where its calls go and its failed requests, and back again; by the URL, too."""
    traffic(town)
    now = time.time()
    town.push_spans(("reviews", "0a" * 8, "", now, 1.0, True), trace="fe" * 16)
    page.goto(f"{town.url}/#seconds=300&selected=service:default/reviews")
    page.get_by_test_id("wide").click()
    assert "wide=true" in page.url
    page.reload()
    page.get_by_test_id("routing").filter(has_text="100 % to v1").wait_for()
    page.get_by_test_id("worst").filter(has_text="failed").wait_for()
    page.get_by_test_id("graph").wait_for(state="hidden")
    assert Axe().run(page).response["violations"] == []
    page.get_by_test_id("wide").click()
    page.get_by_test_id("graph").wait_for()


def test_a_replay_plays_until_it_is_now(page: Any, town: Town) -> None:
    """From twenty seconds ago, in two."""
    traffic(town)
    page.goto(f"{town.url}/#seconds=300&end={int(time.time()) - 20}")
    page.get_by_test_id("play").click()
    page.get_by_text("live", exact=True).wait_for()
    assert "end=" not in page.url


def test_the_slider_shifts_the_traffic(page: Any, town: Town) -> None:
    """What is applied is what the preview showed."""
    traffic(town)
    page.goto(f"{town.url}/#seconds=300&selected=service:default/reviews")
    page.get_by_test_id("actions").click()
    slider = page.get_by_test_id("weight:v2")
    slider.fill("70")
    page.get_by_test_id("preview").filter(has_text="weight: 70").wait_for()
    page.get_by_test_id("apply").click()
    page.get_by_test_id("outcome").filter(has_text="configured").wait_for()
    (stored,) = httpx.get(
        f"{town.url}/v1/objects?kind=VirtualService&name=reviews", trust_env=False, timeout=20
    ).json()["objects"]
    assert "weight: 70" in stored["yaml"]
    page.get_by_role("button", name="Changes").click()
    page.get_by_text(REVIEWS_RULE).first.click()
    page.locator(".difference .added", has_text="weight: 70").wait_for()


def test_a_failed_request_is_found_and_its_spans_are_shown(page: Any, town: Town) -> None:
    """The one that failed by itself, and where."""
    now = time.time()
    town.push_spans(
        ("productpage.default", "01" * 8, "", now, 3.0, False), ("reviews.default", "02" * 8, "01" * 8, now, 1.0, True)
    )
    page.goto(f"{town.url}/#view=traces")
    page.get_by_test_id("traces").get_by_role("button").first.click()
    rows = page.get_by_test_id("waterfall").locator("li")
    rows.nth(1).wait_for()
    assert rows.count() == 2
    assert "✕ reviews.default" in rows.nth(1).inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", ["graph", "traces", "configuration", "changes"])
def test_everybody_can_use_it(page: Any, town: Town, view: str, theme: str) -> None:
    """axe finds nothing wrong in any view, light or dark."""
    traffic(town)
    page.goto(f"{town.url}/#view={view}&theme={theme}&seconds=300&selected=service:default/reviews")
    if view == "graph":
        page.get_by_test_id("panel").locator("table").first.wait_for()
    else:
        page.locator("h2").first.wait_for()
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"][:200], each["nodes"][0]["failureSummary"]) for each in found] == []


def test_nothing_from_elsewhere_may_run(town: Town) -> None:
    """The policy that the page is served with."""
    answer = httpx.get(f"{town.url}/dashboard/", trust_env=False, timeout=20)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("/dashboard/../server.py", "/dashboard/%2e%2e/server.py", "/dashboard/app.py", "/dashboard/x.js"):
        assert httpx.get(town.url + path, trust_env=False, timeout=20).status_code == 404
