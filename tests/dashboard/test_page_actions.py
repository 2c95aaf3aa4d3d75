"""Does the page change the mesh as its preview says, and take the change back? In a real headless Chromium."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

pytest.importorskip("playwright.sync_api")
from axe_playwright_python.sync_playwright import Axe
from pictured_town import CHROMIUM, Town, called, traffic

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    # Playwright's driver leaves its loop to the collector.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]


def rules(town: Town, name: str) -> list[str]:
    answer = httpx.get(f"{town.url}/v1/objects?kind=VirtualService&name={name}", trust_env=False, timeout=20)
    return [each["yaml"] for each in answer.json()["objects"]]


def opened(page: Any, town: Town, service: str, theme: str = "light") -> None:
    traffic(town)
    page.goto(f"{town.url}/#seconds=300&theme={theme}&selected=service:default/{service}")
    page.get_by_test_id("actions").click()
    page.get_by_test_id("preview").wait_for()


def preview(page: Any, text: str) -> None:
    page.get_by_test_id("preview").filter(has_text=text).wait_for()


def done(page: Any, text: str) -> None:
    page.get_by_test_id("outcome").filter(has_text=text).wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_fault_and_a_timeout_are_previewed_applied_and_taken_back(page: Any, town: Town, theme: str) -> None:
    """The folder's rule is in force again afterwards, as it was."""
    (before,) = rules(town, "ratings")
    opened(page, town, "ratings", theme)
    page.get_by_test_id("delay").fill("2.5")
    page.get_by_test_id("delayed").fill("40")
    page.get_by_test_id("aborted").fill("10")
    page.get_by_test_id("abort").fill("418")
    page.get_by_test_id("timeout").fill("4")
    preview(page, "httpStatus: 418")
    page.keyboard.press("Enter")  # in a field: nothing is sent
    page.get_by_test_id("apply").click()
    done(page, "VirtualService ratings configured")
    (after,) = rules(town, "ratings")
    for told in ("fixedDelay: 2.5s", "value: 40", "httpStatus: 418", "value: 10", "timeout: 4s"):
        assert told in after
    assert Axe().run(page).response["violations"] == []
    page.get_by_test_id("take-back").focus()
    page.keyboard.press("Enter")
    page.get_by_test_id("take-back").wait_for(state="detached")
    assert rules(town, "ratings") == [before]


def test_a_shift_keeps_the_timeout_that_is_in_force(page: Any, town: Town) -> None:
    """The form begins with what the rule does."""
    opened(page, town, "reviews")
    page.get_by_test_id("timeout").fill("3")
    preview(page, "timeout: 3s")
    page.get_by_test_id("apply").click()
    done(page, "reviews configured")
    page.reload()
    page.get_by_test_id("actions").click()
    preview(page, "timeout: 3s")
    page.get_by_test_id("weight:v2").fill("30")
    preview(page, "weight: 30")
    preview(page, "timeout: 3s")


def test_a_rule_that_was_not_there_is_gone_when_it_is_taken_back(page: Any, town: Town) -> None:
    """A service without any rule, nor subsets to shift between."""
    town.push({called("productpage-v1", "shelf-v1"): [3.0] * 10})
    opened(page, town, "shelf")
    page.get_by_text("nothing to split").wait_for()
    page.get_by_test_id("delay").fill("1")
    preview(page, "fixedDelay: 1s")
    page.get_by_test_id("apply").click()
    done(page, "shelf created")
    assert len(rules(town, "shelf")) == 1
    page.get_by_test_id("take-back").click()
    done(page, "deleted")
    assert rules(town, "shelf") == []


def test_what_no_rule_can_say_is_not_sent(page: Any, town: Town) -> None:
    """The browser says which field is wrong; the rule stays as it was."""
    before = rules(town, "details")
    opened(page, town, "details")
    page.get_by_test_id("abort").fill("42")
    page.get_by_test_id("apply").click()
    page.locator("[data-testid=abort]:focus").wait_for()
    assert rules(town, "details") == before


def test_a_circuit_is_opened_and_released_after_its_preview(page: Any, town: Town) -> None:
    """By keyboard; the policy is what the preview showed, and gone afterwards."""
    opened(page, town, "details")

    def policies() -> list[str]:
        answer = httpx.get(f"{town.url}/v1/objects?kind=BackendTrafficPolicy", trust_env=False, timeout=20)
        return [each["yaml"] for each in answer.json()["objects"]]

    assert policies() == []
    page.get_by_test_id("circuit-open").focus()
    page.keyboard.press("Enter")
    shown = page.get_by_test_id("circuit-preview").inner_text()
    assert "forced: OPEN" in shown
    assert Axe().run(page).response["violations"] == []
    assert policies() == []
    page.get_by_test_id("circuit-apply").focus()
    page.keyboard.press("Enter")
    page.get_by_test_id("circuit").filter(has_text="held open by details").wait_for()
    (policy,) = policies()
    assert policy.split() == shown.split()
    page.get_by_test_id("circuit-release").click()
    page.get_by_test_id("circuit-apply").click()
    page.get_by_test_id("circuit").filter(has_text="none").wait_for()
    assert policies() == []


def test_what_callers_tell_of_a_service_is_in_its_panel_and_on_its_node(page: Any, town: Town) -> None:
    """An open circuit and an endpoint that is left alone, as marks and in words."""
    traffic(town)
    told = {"istio.workload": "productpage-v1", "service.namespace": "default"}
    cluster = {"cluster": "outbound|9080||ratings.default.svc.cluster.local"}
    town.gauges(told, {"meshlib_breaker_open": cluster, "meshlib_endpoints_ejected": cluster})
    page.goto(f"{town.url}/#seconds=300&selected=service:default/ratings")
    for badge in ("breaker-open", "ejected"):
        page.locator(f'[data-testid="node:default/ratings"] [data-badge="{badge}"]').wait_for(state="attached")
    page.get_by_test_id("circuit").filter(has_text="1 open").wait_for()
