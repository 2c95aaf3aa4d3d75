"""Do the dashboard and the rules ask for what we count? Read by Prometheus' own parser, and held against our names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from meshlib.telemetry import prometheus

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
PROMTOOL = shutil.which("promtool")
SOURCES = [
    path.read_text() for path in (Path(prometheus.__file__).parents[1]).rglob("*.py") if "/cli/" not in str(path)
]
_NAME = re.compile(r"\b(?:istio|pilot|citadel|meshlib)_[a-z_]+\b")


def expressions() -> Iterator[str]:
    """Of the dashboard with its variables filled in, and of the rules."""
    dashboard = json.loads((FOLDER / "grafana-mesh.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield (
                target["expr"]
                .replace("$__rate_interval", "1m")
                .replace("$namespace", ".*")
                .replace("$reporter", "destination")
            )
    for group in yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_every_metric_that_is_asked_for_is_counted() -> None:
    """A dashboard with a name that nobody exposes shows nothing, and nobody learns why."""
    everything = "\n".join(SOURCES)
    asked = {name for text in expressions() for name in _NAME.findall(text)}
    assert len(asked) >= 12
    missing = {
        name
        for name in asked
        if f'"{name}"' not in everything and f'"{re.sub("_(bucket|sum|count)$", "", name)}"' not in everything
    }
    assert missing == set()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    """The rules as they are; the dashboard's as rules."""
    panels = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    for file in (FOLDER / "prometheus-rules.yaml", tmp_path / "panels.yaml"):
        found = subprocess.run([str(PROMTOOL), "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr + found.stdout


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
def test_alerts_are_raised_when_they_should_be_and_not_before(tmp_path: Path) -> None:
    """Series of a mesh that fails, is cut off or runs out, through Prometheus' own evaluation."""
    cases = (Path(__file__).parent / "rules.test.yaml").read_text()
    (tmp_path / "cases.yaml").write_text(cases.replace("RULES", str(FOLDER / "prometheus-rules.yaml")))
    found = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(tmp_path / "cases.yaml")], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_says_what_to_do() -> None:
    """At three in the morning."""
    for group in yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert set(rule["annotations"]) == {"summary", "action"}
                assert rule["labels"]["severity"] in ("warning", "critical")
