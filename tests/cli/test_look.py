"""What do stat, edges, traces and dashboard print? Against a whole control plane with known traffic."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dashboard.pictured_town import Town, called
from meshlib.cli.app import app

Meshctl = Callable[..., Result]


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    with Town(tmp_path) as made:
        yield made


@pytest.fixture
def meshctl(town: Town) -> Meshctl:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--control-plane", town.url], env={"MESHCTL_ADMIN": ""})

    return run


def test_stat_and_edges_show_what_was_pushed(town: Town, meshctl: Meshctl) -> None:
    """In linkerd's columns; the same as JSON."""
    assert "no process is connected" in meshctl("stat").stderr
    town.push(
        {
            called("productpage-v1", "reviews-v1"): [3.0] * 45,
            called("productpage-v1", "reviews-v1", "503", "UF"): [3.0] * 15,
        }
    )
    lines = meshctl("stat").stdout.splitlines()
    assert lines[0].split() == (
        ["NAMESPACE", "KIND", "NAME", "INSTANCES", "SUCCESS", "RPS", "LATENCY_P50", "LATENCY_P95", "LATENCY_P99"]
    )
    (reviews,) = (line.split() for line in lines if "service" in line)
    assert reviews == ["default", "service", "reviews", "-", "75.00%", "1.0rps", "3ms", "5ms", "5ms"]
    (edge,) = (line.split() for line in meshctl("edges").stdout.splitlines()[1:])
    assert edge[:7] == ["productpage-v1", "reviews-v1", "default", "default", "√", "75.00%", "1.0rps"]
    (told,) = json.loads(meshctl("edges", "-o", "json", "-n", "default").stdout)
    assert told["codes"] == {"200": 0.75, "503 UF": 0.25}
    assert meshctl("edges", "-n", "elsewhere").exit_code == 1


def test_traces_lists_the_failed_ones(town: Town, meshctl: Meshctl) -> None:
    """One that is asked for and not there is no empty table."""
    assert "no such trace" in meshctl("traces").stderr
    town.push_spans(("reviews", "01" * 8, "", time.time(), 0.25, True))
    (line,) = meshctl("traces", "--failed", "--slower", "200").stdout.splitlines()[1:]
    assert line.split()[0] == "ab" * 16
    assert line.split()[2:] == ["reviews", "GET", "250ms", "1", "failed"]
    assert meshctl("traces", "--slower", "300").exit_code == 1


def test_dashboard_says_where_it_is(town: Town, meshctl: Meshctl) -> None:
    """And that nobody is there, rather than opening a page that can't load."""
    assert meshctl("dashboard", "--no-browser").stdout == f"{town.url}/dashboard/\n"
    nobody = CliRunner().invoke(app, ["dashboard", "--control-plane", "http://127.0.0.1:9"])
    assert (nobody.exit_code, "no control plane" in nobody.stderr) == (1, True)


def test_stat_tells_success_before_and_after_retries(town: Town, meshctl: Meshctl) -> None:
    """As the callers of a service have seen it: every try that was followed by another has failed."""
    source = called("productpage-v1", "reviews-v1")._replace(reporter="source")
    town.push({source: [3.0] * 54, source._replace(response_code="503", response_flags="UF"): [3.0] * 6})
    town.push_retries("productpage-v1", "outbound|9080||reviews.default.svc.cluster.local", 60)
    lines = meshctl("stat", "-o", "wide").stdout.splitlines()
    assert lines[0].split()[-4:] == ["EFFECTIVE_SUCCESS", "EFFECTIVE_RPS", "ACTUAL_SUCCESS", "ACTUAL_RPS"]
    (reviews,) = (line.split() for line in lines if "service" in line)
    assert reviews[-4:] == ["90.00%", "1.0rps", "45.00%", "2.0rps"]
    (told,) = (each for each in json.loads(meshctl("stat", "-o", "json").stdout) if each["kind"] == "service")
    assert told["tries"] == {
        "effective_success": 0.9, "effective_rps": 1.0, "actual_success": 0.45, "actual_rps": 2.0
    }  # fmt: skip


def test_a_watched_table_is_shown_until_it_is_enough(
    town: Town, meshctl: Meshctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while there is nothing to see yet; Ctrl-C is no failure."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt
        town.push({called("productpage-v1", "reviews-v1"): [3.0]})

    monkeypatch.setattr("meshlib.cli.live.time.sleep", sleep)
    found = meshctl("stat", "--watch")
    assert (found.exit_code, slept) == (0, [2.0, 2.0])
    assert found.stdout.splitlines()[0].startswith("no process is connected")
    assert "reviews-v1" in found.stdout
    assert meshctl("stat", "--watch", "-o", "json").exit_code == 1
