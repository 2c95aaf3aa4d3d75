"""Does the page ask who is there, and offer what they may do and no more? In a real headless Chromium."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from pictured_town import BOOKINFO, CHROMIUM, FLAGS, Town, called  # noqa: E402

from controlplane.access import TOKENS, write_access  # noqa: E402

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
"""


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("mesh")
    rules = BOOKINFO / "networking" / "destination-rule-all.yaml"
    (folder / "rules.yaml").write_text(rules.read_text())
    (folder / "services.yaml").write_text(SERVICE)
    made = Town(folder)
    access = write_access(tmp_path_factory.mktemp("access"))
    made._settings = dataclasses.replace(made._settings, access=access)
    with made:
        yield made


@pytest.fixture
def page(town: Town) -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
        made = context.new_page()
        made.set_default_timeout(30_000)
        made.goto(f"{town.url}/#seconds=300&selected=service:default/reviews")
        yield made
        context.close()
        browser.close()


def sign_in(page: Any, name: str) -> None:
    page.get_by_label("Token").fill(TOKENS[name])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_test_id("me").filter(has_text=f"token:{name}").wait_for()


def test_an_operator_signs_in_applies_and_is_named(page: Any, town: Town) -> None:
    """A wrong token first; the cookie is no script's to read; what was applied says by whom; signed out is out."""
    page.get_by_label("Token").fill("mat_guess")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("alert").filter(has_text="not good here").wait_for()
    assert Axe().run(page).response["violations"] == []
    sign_in(page, "olaf")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie + sessionStorage.length + localStorage.length") == "00"
    town.push({called("productpage-v1", "reviews-v1"): [5.0] * 30})
    page.get_by_test_id("actions").click()
    page.get_by_test_id("weight:v2").fill("70")
    page.get_by_test_id("apply").click()
    page.get_by_test_id("outcome").filter(has_text="created").wait_for()
    page.get_by_role("button", name="Changes").click()
    page.get_by_text("by token:olaf").first.wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    assert page.context.cookies() == []


def test_a_viewer_sees_why_not(page: Any, town: Town, tmp_path: Path) -> None:
    """The button is there and says which role it takes."""
    town.push({called("productpage-v1", "reviews-v1"): [5.0] * 30})
    sign_in(page, "vera")
    page.get_by_test_id("actions").click()
    assert page.get_by_test_id("apply").is_disabled()
    assert "needs the role operator" in page.get_by_test_id("lack").inner_text()
    assert Axe().run(page).response["violations"] == []
