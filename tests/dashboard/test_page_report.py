"""Is what the page knows saved as one file that needs nothing else, without secrets? In a real headless Chromium."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
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
CHANGE = """
apiVersion: v1
kind: Secret
metadata: {name: certificate}
stringData: {password: aeneas-and-dido}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shelf, labels: {note: "<script>alert(1)</script>"}}
spec:
  hosts: [shelf]
  http:
  - headers: {request: {set: {authorization: "Bearer aeneas-and-dido"}}}
    route: [{destination: {host: nowhere.default.svc.cluster.local}}]
"""


def test_a_report_is_one_file_that_opens_offline_and_holds_no_secret(
    page: Any, browser: Any, town: Town, tmp_path: Path
) -> None:
    """By keyboard; the graph, the problems and the changes are in it, for people and for programs."""
    told = httpx.post(
        f"{town.url}/v1/apply", content=CHANGE, headers={"content-type": "application/yaml"}, trust_env=False
    )
    assert "created" in told.text, told.text
    traffic(town)
    page.goto(f"{town.url}/#seconds=300")
    page.get_by_test_id("edge:default/reviews>default/reviews-v2").wait_for(state="attached")
    page.get_by_test_id("report").focus()
    with page.expect_download() as saving:
        page.keyboard.press("Enter")
    file = tmp_path / "report.html"
    saving.value.save_as(file)
    text = file.read_text()
    assert "aeneas-and-dido" not in text and "<script" not in text
    known = json.loads(html.unescape(re.search(r'<pre id="json">(.*?)</pre>', text, re.DOTALL)[1]))  # type: ignore[index]
    assert {"graph", "problems", "clients", "changes", "version"} <= known.keys()
    assert "VirtualService default/shelf" in {each["object"] for each in known["changes"]}
    context = browser.new_context(offline=True)
    try:
        alone = context.new_page()
        alone.goto(file.as_uri())
        alone.get_by_role("cell", name="default/reviews-v2").first.wait_for()
        drawn = alone.locator(".picture svg .node", has_text="reviews-v2")
        assert drawn.evaluate("e => getComputedStyle(e.querySelector('.outline')).stroke") == "rgb(179, 38, 30)"
        alone.get_by_role("cell", name=re.compile("nowhere")).first.wait_for()
        assert Axe().run(alone).response["violations"] == []
    finally:
        context.close()
