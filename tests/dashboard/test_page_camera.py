"""Can a reader look at a wide graph as closely, and from where, as they like; by mouse and by keyboard; and keep it?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

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
COLUMNS = ("web", "cart", "stock", "depot", "truck", "road", "town")


@pytest.fixture
def wide(page: Any, town: Town) -> Any:
    """Thirteen columns, of services and their workloads."""
    pairs = pairwise(COLUMNS)
    town.push({called(f"{one}-v1", f"{two}-v1"): [5.0] * 10 for one, two in pairs})
    page.goto(f"{town.url}/#seconds=300")
    page.get_by_test_id("node:default/town-v1").wait_for()
    return page


def scale(page: Any) -> float:
    return float(page.get_by_test_id("graph").get_attribute("data-scale"))


def until(page: Any, holds: Callable[[], bool]) -> None:
    """The page's policy lets no text be evaluated, so it is asked again and again."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < 20, f"{page.url}, scale {scale(page)}"
        page.wait_for_timeout(50)


def is_whole(page: Any, name: str) -> bool:
    """Whether the node is within the stage."""
    stage, node = page.get_by_test_id("graph").bounding_box(), page.get_by_test_id(f"node:{name}").bounding_box()
    return bool(
        stage["x"] <= node["x"]
        and node["x"] + node["width"] <= stage["x"] + stage["width"]
        and stage["y"] <= node["y"]
        and node["y"] + node["height"] <= stage["y"] + stage["height"]
    )


def test_all_of_a_wide_graph_is_seen_beside_the_panel(wide: Any) -> None:
    """Nothing has to be scrolled for, before and after."""
    assert is_whole(wide, "default/web-v1") and is_whole(wide, "default/town-v1")
    before = scale(wide)
    wide.get_by_test_id("node:default/depot-v1").click()
    wide.get_by_test_id("panel").wait_for()
    until(wide, lambda: scale(wide) < before - 0.01)
    assert is_whole(wide, "default/web-v1") and is_whole(wide, "default/town-v1")
    assert wide.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_was_chosen_is_kept(wide: Any) -> None:
    """By the URL: through a new selection, a reload, and a colleague's browser. Fit lets it go."""
    wide.keyboard.press("+")
    wide.keyboard.press("+")
    wide.keyboard.press("ArrowRight")
    wide.wait_for_url(re.compile("camera="))
    chosen = scale(wide)
    wide.get_by_test_id("node:default/depot-v1").click()
    wide.get_by_test_id("panel").wait_for()
    assert scale(wide) == chosen
    wide.reload()
    wide.get_by_test_id("node:default/depot-v1").wait_for()
    until(wide, lambda: scale(wide) == chosen)
    wide.get_by_role("button", name="Fit").click()
    until(wide, lambda: "camera=" not in wide.url and scale(wide) < chosen)


def test_the_wheel_zooms_where_the_mouse_is_and_a_drag_is_no_click(wide: Any) -> None:
    """What is below the mouse stays there; what is dragged follows it, and nothing is selected."""
    node = wide.get_by_test_id("node:default/road-v1")
    box = node.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = scale(wide)
    wide.mouse.move(x, y)
    wide.mouse.wheel(0, -600)
    until(wide, lambda: scale(wide) > before * 1.5)
    box = node.bounding_box()
    middle = box["x"] + box["width"] / 2
    assert middle == pytest.approx(x, abs=box["width"] / 3)
    wide.mouse.move(x, y)
    wide.mouse.down()
    wide.mouse.move(x - 150, y, steps=5)
    wide.mouse.up()
    moved = node.bounding_box()
    assert moved["x"] + moved["width"] / 2 == pytest.approx(middle - 150, abs=12)
    assert "selected" not in wide.url
    node.click()
    wide.get_by_test_id("panel").filter(has_text="road").wait_for()


def test_what_gets_the_focus_is_brought_into_view(wide: Any) -> None:
    """By Tab, one after the other, however near the reader is."""
    for _ in range(6):
        wide.keyboard.press("+")
    wide.get_by_test_id("node:default/cart").evaluate("e => e.focus({focusVisible: true})")
    wide.keyboard.press("Tab")
    for _ in range(20):
        name = wide.evaluate("document.activeElement?.dataset?.testid ?? ''")
        if not name.startswith("node:"):
            break
        assert is_whole(wide, name.removeprefix("node:")), name
        wide.keyboard.press("Tab")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_calls_go_downwards_and_nothing_sticks_out(page: Any, town: Town, theme: str) -> None:
    """Every view, as wide as the screen, and axe finds nothing."""
    town.push({called("web-v1", "cart-v1"): [5.0] * 10})
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{town.url}/#seconds=300&theme={theme}")
    page.locator("[data-testid=graph][data-flow=down]").wait_for()
    one = page.get_by_test_id("node:default/web-v1").bounding_box()
    two = page.get_by_test_id("node:default/cart-v1").bounding_box()
    assert two["y"] > one["y"] + one["height"]
    page.get_by_test_id("legend").locator("summary").click()
    for view in ("graph", "traces", "configuration", "changes"):
        page.goto(f"{town.url}/#view={view}&seconds=300&theme={theme}")
        page.locator("nav [aria-current=page]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
        assert Axe().run(page).response["violations"] == []
