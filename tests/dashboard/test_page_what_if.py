"""Does the page say what a text would do before it is applied? In a real headless Chromium."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

pytest.importorskip("playwright.sync_api")
from axe_playwright_python.sync_playwright import Axe
from pictured_town import CHROMIUM, Town, called

from meshlib.mesh import Mesh
from meshlib.settings import Settings

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    # Playwright's driver leaves its loop to the collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_edited_rule_is_held_against_the_recorded_traffic(page: Any, town: Town, theme: str) -> None:
    """A quarter to v9, a subset that does not exist, and nothing of it in force."""
    town.push({called("productpage-v1", "reviews-v1"): [5.0] * 40})
    page.goto(f"{town.url}/#view=configuration&theme={theme}&find=VirtualService+default/reviews")
    page.get_by_role("button", name="Try a change").click()
    editor = page.get_by_test_id("editor")
    editor.and_(page.locator(":focus")).wait_for()
    route = "destination: {{host: reviews, subset: {}}}, weight: {}"
    editor.fill(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: reviews}\n"
        "spec:\n  hosts: [reviews]\n  http:\n  - timeout: 2s\n    route:\n"
        f"    - {{{route.format('v1', 75)}}}\n    - {{{route.format('v9', 25)}}}\n"
    )
    page.get_by_test_id("what-if").focus()
    page.keyboard.press("Enter")
    answer = page.get_by_test_id("what-if-answer")
    for told in ("100 % to reviews.default.svc.cluster.local v1", "75 % to", "25 % to", "timeout 2s", "v9"):
        answer.filter(has_text=told).wait_for()
    answer.locator(".problem").filter(has_text="v9").wait_for()
    assert Axe().run(page).response["violations"] == []
    (kept,) = httpx.get(f"{town.url}/v1/objects?kind=VirtualService&name=reviews", trust_env=False, timeout=20).json()[
        "objects"
    ]
    assert "v9" not in kept["yaml"]


def test_a_problem_stands_below_the_line_that_it_is_about(page: Any, town: Town) -> None:
    """The second destination's subset, which nobody defines."""
    destinations = "".join(f"{{destination: {{host: ratings, subset: {name}}}, weight: 50}}, " for name in ("v1", "v7"))
    rule = (
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: ratings, namespace: default}\n"
        f"spec: {{hosts: [ratings], http: [{{route: [{destinations}]}}]}}\n"
    )
    headers = {"content-type": "application/yaml"}
    httpx.post(f"{town.url}/v1/apply", content=rule, headers=headers, trust_env=False, timeout=20).raise_for_status()
    page.goto(f"{town.url}/#view=configuration&find=VirtualService+default/ratings")
    marked = page.locator(".yaml .marked", has=page.get_by_test_id("problem-in-place"))
    marked.first.wait_for()
    assert [text.split("\n")[0].strip() for text in marked.all_inner_texts()] == ["subset: v7"]
    assert Axe().run(page).response["violations"] == []


def test_a_text_that_is_asked_about_can_be_applied(page: Any, town: Town) -> None:
    """And asked about again, it would do nothing."""
    page.goto(f"{town.url}/#view=configuration")
    page.get_by_test_id("editor").fill(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: shelf}\n"
        "spec: {hosts: [shelf], http: [{timeout: 7s, route: [{destination: {host: shelf}}]}]}\n"
    )
    answer = page.get_by_test_id("what-if-answer")
    page.get_by_test_id("what-if").click()
    answer.filter(has_text="timeout 7s").wait_for()
    page.get_by_test_id("apply-text").click()
    page.get_by_test_id("applied").filter(has_text="VirtualService shelf created").wait_for()
    page.get_by_test_id("what-if").click()
    answer.filter(has_text="No route, and no policy, of anybody would change").wait_for()


def test_callers_that_new_rules_would_turn_away_are_named(page: Any, town: Town) -> None:
    """Who calls, how often, and the rule; what depends on more than was recorded is said to."""
    settings = Settings(
        control_plane=town.target,
        service="details",
        workload="details-v1",
        labels=(("app", "details"),),
        address="127.0.0.1:9080",
        telemetry="off",
    )
    with Mesh(settings) as callee:
        callee.start()
        town.push({called("productpage-v1", "details-v1", mtls=False): [5.0] * 40})
        page.goto(f"{town.url}/#view=configuration")
        strict = (
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: all, namespace: default}\n"
            "spec: {mtls: {mode: STRICT}}\n"
        )
        page.get_by_test_id("editor").fill(strict)
        away = page.get_by_test_id("turned-away")
        while True:  # until the callee is known, whose rules they are
            page.get_by_test_id("what-if").click()
            away.wait_for()
            if "would be turned away" in away.inner_text() and "default/details-v1" in away.inner_text():
                break
        for told in ("40 of 40", "default/productpage-v1", "✕ all 40", "PeerAuthentication default/all"):
            assert told in away.inner_text()
        assert Axe().run(page).response["violations"] == []
        page.get_by_test_id("editor").fill(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: get, namespace: default}\n"
            "spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}\n"
        )
        page.get_by_test_id("what-if").click()
        away.filter(has_text="depends on: method").wait_for()
        assert "may be turned away" in away.inner_text()
