"""A headless Chromium and a control plane to look at, for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pictured_town import BOOKINFO, CHROMIUM, FLAGS, Town


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("mesh")
    networking = BOOKINFO / "networking"
    for name in ("destination-rule-all.yaml", "virtual-service-all-v1.yaml"):
        (folder / name).write_text((networking / name).read_text())
    services = "".join(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  selector: {{app: {name}}}\n"
        f"  ports: [{{name: http, port: 9080}}]\n---\n"
        for name in ("productpage", "details", "reviews", "ratings", "shelf")
    )
    (folder / "services.yaml").write_text(services)
    with Town(folder) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, town: Town) -> Iterator[Any]:
    """Fails where the console tells of an error, or the page asks anybody but the control plane."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    made = context.new_page()
    errors: list[str] = []
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("request", lambda asked: None if asked.url.startswith((town.url, "data:")) else errors.append(asked.url))
    made.set_default_timeout(30_000)
    yield made
    context.close()
    assert errors == []
