"""The documentation's pictures are taken here, of made-up traffic: MESHLIB_SCREENSHOTS=1 writes them into docs/."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from pictured_town import CHROMIUM, Town, traffic
from test_page_changes import CHANGES
from test_page_reasons import TRACE, tried_twice

DOCS = Path(__file__).parents[2] / "docs" / "how-to"
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    # Playwright's driver leaves its loop to the collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


def graph(page: Any, town: Town) -> None:
    for ago in range(5, 60, 5):
        traffic(town, ago)
    page.goto(f"{town.url}/#seconds=300&theme=light&selected=workload:default/reviews-v2")
    page.get_by_test_id("panel").filter(has_text="Called by").wait_for()
    page.locator(".uplot").first.wait_for()


def actions(page: Any, town: Town) -> None:
    page.goto(f"{town.url}/#seconds=300&theme=light&wide=true&selected=service:default/reviews")
    page.get_by_test_id("actions").click()
    page.get_by_test_id("weight:v2").fill("25")
    page.get_by_test_id("delay").fill("2")
    page.get_by_test_id("what-if").click()
    page.get_by_test_id("what-if-answer").filter(has_text="25 % to").wait_for()
    page.get_by_test_id("what-if-answer").scroll_into_view_if_needed()


def decision(page: Any, town: Town) -> None:
    page.goto(f"{town.url}/#view=traces&theme=light&trace={TRACE}")
    page.get_by_test_id("waterfall").get_by_role("button", name="productpage.default").first.click()
    page.get_by_test_id("decision").wait_for()


@pytest.mark.parametrize("view", [graph, actions, decision], ids=lambda view: view.__name__)
def test_a_picture_of_the_documentation_can_be_taken(page: Any, town: Town, tmp_path: Path, view: Any) -> None:
    """What it shows is there before it is taken; and the one that is kept is of the same size."""
    name = f"dashboard-{view.__name__}.png"
    traffic(town)
    tried_twice(town)
    page.set_viewport_size({"width": 1280, "height": 720})
    view(page, town)
    file = (DOCS if os.environ.get("MESHLIB_SCREENSHOTS") else tmp_path) / name
    page.screenshot(path=file)
    for each in (file, DOCS / name):
        header = each.read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1280, 720)


def test_every_picture_of_the_page_is_taken_here() -> None:
    """None in the guide is of an older page that nobody can show again; CHANGES is taken beside its test."""
    shown = set(re.findall(r"\((dashboard-[a-z]+\.png)\)", (DOCS / "dashboard.md").read_text()))
    assert shown == {CHANGES, *(f"dashboard-{view.__name__}.png" for view in (graph, actions, decision))}
