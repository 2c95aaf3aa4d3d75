"""Is the picture of the Bookinfo demo the traffic that was really sent? Ten processes, and a browser that looks on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pictured_town import CHROMIUM, FLAGS

from e2e.test_demo import Demo
from promises import within

sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(240),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    # Playwright's driver leaves its loop to the collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("demo"), "--port", "0")
    try:
        assert demo.page
        yield demo
    finally:
        demo.stop()


@pytest.fixture(scope="module")
def page(demo: Demo) -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        made = browser.new_page(viewport={"width": 1400, "height": 800}, reduced_motion="reduce")
        made.set_default_timeout(60_000)
        made.goto(demo.line(r"the mesh at work: (\S+)")[1] + "#seconds=60")
        yield made
        browser.close()


def rate(page: Any, source: str, target: str, name: str = "data-rps") -> float:
    found = page.get_by_test_id(f"edge:{source}>{target}")
    return float(found.get_attribute(name)) if found.count() else 0.0


def eventually(page: Any, holds: Callable[[], bool], what: Callable[[], str], seconds: float = 60) -> float:
    """Returns after how many seconds it held. what: is said where it does not."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, what()
        page.wait_for_timeout(100)  # the page's own loop goes on meanwhile
    return time.monotonic() - began


def test_the_first_request_shows_at_once(demo: Demo, page: Any) -> None:
    """The promise is two seconds; a machine that runs other tests beside it gets more."""
    with demo.browser() as browser:
        gateway, productpage = "istio-system/istio-ingressgateway", "default/productpage"
        eventually(page, lambda: rate(page, gateway, productpage) > 0, lambda: "the demo's own request is not drawn")
        eventually(page, lambda: page.locator("g.edge").count() >= 6, lambda: "not all calls are drawn")
        before = rate(page, gateway, productpage)
        browser.get("/productpage")
        took = eventually(page, lambda: rate(page, gateway, productpage) > before, lambda: "the request is not drawn")
    assert took < within(2)


def test_edges_bear_what_was_sent_within_a_tenth(demo: Demo, page: Any) -> None:
    """Each page asks details and reviews once; two of three versions of reviews ask ratings."""
    with demo.browser() as browser:
        for _ in range(120):
            assert browser.get("/productpage").status_code == 200
    page.goto(
        page.url.replace("seconds=60", "seconds=300")
    )  # none of it leaves the window, however slow the machine is
    sent = pytest.approx(121 / 300, rel=0.1)
    gateway, productpage = "istio-system/istio-ingressgateway", "default/productpage-v1"

    def whole() -> list[float]:
        return [
            rate(page, gateway, "default/productpage"),
            rate(page, productpage, "default/details"),
            rate(page, productpage, "default/reviews"),
        ]

    def versions() -> list[float]:
        return [rate(page, "default/reviews", f"default/reviews-v{number}") for number in (1, 2, 3)]

    try:
        eventually(
            page,
            lambda: whole() == [sent] * 3 and sum(versions()) == sent and min(versions()) > 0,
            lambda: f"{whole()} and {versions()}, sent {sent}",
        )
        assert rate(page, "default/reviews-v1", "default/ratings") == 0
        entrance = page.get_by_test_id(f"node:{gateway}")  # of which nobody reports what comes in: it is what goes on
        assert (entrance.get_attribute("data-health"), float(entrance.get_attribute("data-rps"))) == ("healthy", sent)
    finally:
        page.goto(page.url.replace("seconds=300", "seconds=60"))


def test_the_slider_changes_the_split_that_is_then_measured(demo: Demo, page: Any) -> None:
    """All to v3, by the page alone: no shell, no YAML file."""
    page.get_by_test_id("node:default/reviews").click()
    page.get_by_test_id("actions").click()
    page.get_by_test_id("weight:v3").fill("100")
    page.get_by_test_id("apply").click()
    page.get_by_test_id("outcome").filter(has_text="reviews").wait_for()
    with demo.browser() as browser:

        def version() -> str:
            text = browser.get("/productpage").text
            return next((each for each in ("reviews-v1", "reviews-v2", "reviews-v3") if each in text), "none")

        eventually(
            page, lambda: Counter(version() for _ in range(6)) == {"reviews-v3": 6}, lambda: "the split did not change"
        )
        page.goto(page.url.partition("#")[0] + "#seconds=10")

        def measured() -> list[float]:
            return [rate(page, "default/reviews", f"default/reviews-v{number}") for number in (1, 2, 3)]

        def is_shifted() -> bool:
            browser.get("/productpage")
            one, two, three = measured()
            return one == two == 0 < three

        eventually(page, is_shifted, lambda: f"{measured()} to the three versions")
        page.goto(page.url.partition("#")[0] + "#seconds=60")
    page.keyboard.press("Escape")


def test_a_service_that_stands_still_turns_red(demo: Demo, page: Any) -> None:
    """Stopped, not killed: the demo would start it anew. Calls to it time out, and the edge says so: of the last
    ten seconds, which the calls before it have soon left. One that refuses is red within ten; here productpage's own
    time-outs take six before anything has failed."""
    page.goto(page.url.partition("#")[0] + "#seconds=10")
    stopped = demo.pids()["reviews-v3"]
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=demo.page.removesuffix("/productpage"), trust_env=False, timeout=20) as browser:
            while not done.is_set():
                browser.get("/productpage")

    callers = [threading.Thread(target=ask) for _ in range(4)]
    os.kill(stopped, signal.SIGSTOP)
    try:
        for caller in callers:
            caller.start()
        took = eventually(
            page,
            lambda: any(
                rate(page, "default/productpage-v1", target, "data-err") >= 0.1
                for target in ("default/reviews", "default/reviews-v3")
            ),
            lambda: "no edge to reviews has failed",
        )
        assert took < within(20)
        assert page.locator("g.edge.failure").count() > 0
    finally:
        os.kill(stopped, signal.SIGCONT)
        done.set()
        for caller in callers:
            caller.join()
