"""Does the page say what became of the traffic after a change? In a real headless Chromium."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright.sync_api")
from axe_playwright_python.sync_playwright import Axe
from pictured_town import CHROMIUM, Town, called

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    # Playwright's driver leaves its loop to the collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]
CHANGES = "dashboard-changes.png"
DOCS = Path(__file__).parents[2] / "docs" / "how-to"
ABORT = """apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shelf, namespace: default}
spec:
  hosts: [shelf]
  http: [{fault: {abort: {httpStatus: 503, percentage: {value: 50}}}, route: [{destination: {host: shelf}}]}]
"""


def test_a_change_is_told_with_the_traffic_on_either_side(page: Any, town: Town, tmp_path: Path) -> None:
    """Pushed until it falls behind the slot of the change: figures with their weight, and that it is not over yet."""
    good, bad = called("productpage-v1", "shelf-v1"), called("productpage-v1", "shelf-v1", "503", "FI")
    for ago in range(10, 50, 5):
        town.push({good: [10.0] * 5}, ago)
    headers = {"content-type": "application/yaml"}
    httpx.post(f"{town.url}/v1/apply", content=ABORT, headers=headers, trust_env=False, timeout=20).raise_for_status()
    page.set_viewport_size({"width": 1280, "height": 720})
    page.goto(f"{town.url}/#view=changes&seconds=60&theme=light")
    entry = page.locator("li", has=page.get_by_text("VirtualService default/shelf"))
    entry.filter(has_text="created").wait_for()
    row = entry.locator("tr", has_text="default/shelf")
    row.filter(has_text="40 → 0 too few yet").wait_for()
    for _ in range(60):
        town.push({good: [10.0], bad: [300.0] * 3})
        page.wait_for_timeout(250)
        if "too few" not in row.inner_text():
            break
    told = row.inner_text()
    assert ("100 % →" in told, "▼ worse" in told, "▲ worse" in told) == (True, True, True), told
    assert "What comes after is not over" in entry.inner_text()
    assert row.locator("svg.course rect.failed").count() > 0
    assert Axe().run(page).response["violations"] == []
    page.screenshot(path=(DOCS if os.environ.get("MESHLIB_SCREENSHOTS") else tmp_path) / CHANGES)
    row.get_by_role("button", name="default/shelf").click()
    page.get_by_test_id("panel").filter(has_text="shelf").wait_for()


def test_a_change_that_nobody_called_through_says_so(page: Any, town: Town) -> None:
    """Rather than showing nought as if it were a figure."""
    headers = {"content-type": "application/yaml"}
    quiet = ABORT.replace("shelf", "details")
    httpx.post(f"{town.url}/v1/apply", content=quiet, headers=headers, trust_env=False, timeout=20).raise_for_status()
    page.goto(f"{town.url}/#view=changes&seconds=60&find=details")
    entry = page.locator("li", has=page.get_by_text("VirtualService default/details"))
    entry.filter(has_text="The service that it touches had no request in the 60 s before or after it.").wait_for()
