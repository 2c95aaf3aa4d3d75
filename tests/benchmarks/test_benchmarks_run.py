"""The benchmarks run and report every row; what they measure is not judged here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.effort import SMOKE
from benchmarks.report import losses, write
from benchmarks.rounds import Round, percentile, ratio
from benchmarks.rounds import row as row_of_rounds
from benchmarks.run import measured
from benchmarks.run import run as run_sections
from benchmarks.sections import SECTIONS
from benchmarks.sidecars import Missing, found
from benchmarks.targets import Target, targets

from benchmarks import calls, gateway, grpc_calls, inbound, instead, mtls, startup, updates
from meshlib.model import LoadBalancing

ROOT = Path(__file__).parents[2]
(AT_ONCE,) = SMOKE.concurrency
processes = pytest.mark.processes
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def measure(section: str) -> dict[str, Any]:
    """A few calls, in this process; JSON and back, as it is kept."""
    rows = importlib.import_module(f"benchmarks.{SECTIONS[section].module}").measure(SMOKE)
    kept: dict[str, Any] = json.loads(json.dumps(rows))
    return kept


def figures(row: dict[str, Any]) -> Iterator[float]:
    for value in row.values():
        if isinstance(value, list):
            yield from value


def assert_well_formed(rows: list[dict[str, Any]]) -> None:
    """Of each figure one for each round, and none that can't be."""
    assert rows
    for row in rows:
        lengths = {len(value) for value in row.values() if isinstance(value, list)}
        assert len(lengths) == 1 and lengths != {0}, row
        assert all(figure >= 0 for figure in figures(row)), row


def contestants(rows: list[dict[str, Any]], client: str) -> list[str]:
    return [row["contestant"] for row in rows if (row["client"], row["concurrency"]) == (client, AT_ONCE)]


@processes
def test_our_own_code_is_measured() -> None:
    """Whatever is compared with something is compared with a row that is there."""
    rows = measure("policy")["rows"]
    assert_well_formed(rows)
    names = {row["what"] for row in rows}
    assert all(row["against"] in {"", *names} for row in rows) and any(row["against"] for row in rows)


def test_every_policy_picks_at_every_size() -> None:
    """Three sizes each."""
    rows = measure("picks")["rows"]
    assert_well_formed(rows)
    assert [(row["policy"], row["endpoints"]) for row in rows] == [
        (policy.lower(), size) for policy in LoadBalancing for size in (10, 1_000, 10_000)
    ]


@processes
def test_what_beginning_costs_is_measured() -> None:
    """Imports and first calls, each by a process of its own."""
    rows = measure("startup")["rows"]
    assert_well_formed(rows)
    assert [row["what"] for row in rows] == list(startup.CONTESTANTS)


@processes
def test_every_client_is_measured_bare_and_meshed() -> None:
    """In plaintext and with mTLS."""
    rows = measure("calls")["rows"]
    assert_well_formed(rows)
    for client in calls.CLIENTS:
        names = contestants(rows, client)
        assert {calls.BARE, calls.MESHED, calls.BARE + calls.TLS, calls.MESHED + calls.TLS} <= set(names), client
        assert len(names) == {"httpx, sync": 6, "httpx, async": 8}.get(client, 4)


@processes
def test_what_grpc_calls_cost_is_measured() -> None:
    """Blocking and on asyncio."""
    rows = measure("grpc")["rows"]
    assert_well_formed(rows)
    for client in grpc_calls.CLIENTS:
        assert contestants(rows, client)[:3] == [grpc_calls.BARE, grpc_calls.INTERCEPTORS, grpc_calls.CHANNEL]


@processes
def test_what_a_new_connection_costs_is_measured() -> None:
    """With and without mTLS."""
    rows = measure("mtls")["rows"]
    assert_well_formed(rows)
    assert {mtls.NEW, mtls.NEW_TLS} <= {row["what"] for row in rows}


@processes
@linux
def test_the_alternatives_are_measured_or_told_to_be_missing() -> None:
    """Pairs of proxies, and libraries by hand."""
    told = measure("instead")
    assert_well_formed(told["rows"])
    names = {*(row["contestant"] for row in told["rows"]), *told["skipped"]}
    pairs = {instead.pair(name) for name in ("Envoy", "HAProxy", "nginx")}
    assert names == pairs | {
        *(instead.ALONE, instead.ALONE_TLS, instead.BY_HAND, instead.INSTRUMENTED),
        *(instead.MESHED, instead.MESHED_TLS, instead.MESHED_AIOHTTP, instead.MESHED_SPAN),
    }
    assert all("is not installed" in why for why in told["skipped"].values()), told["skipped"]


@processes
def test_a_server_is_measured() -> None:
    """By uvicorn, and by decisions alone."""
    told = measure("inbound")
    assert_well_formed(told["rows"])
    assert contestants(told["rows"], "raw") == list(inbound.KINDS)
    names = [each["what"] for each in told["decisions"]]
    assert names[:2] == ["no rules", "1 policy"] and names[-2:] == ["ASGI, 100 policies", "WSGI, 100 policies"]


@processes
@linux
def test_the_gateway_is_measured() -> None:
    """Beside nginx, where that is."""
    told = measure("gateway")
    assert_well_formed(told["rows"])
    assert {*contestants(told["rows"], "raw"), *told["skipped"]} == {gateway.STRAIGHT, gateway.GATEWAY, gateway.NGINX}


@processes
def test_changes_of_configuration_are_measured() -> None:
    """With changes that reach the process, and with changes that do not."""
    rows = measure("updates")["rows"]
    assert_well_formed(rows)
    assert [row["what"] for row in rows] == [updates.PEACE, updates.NOT_TOLD, updates.TOLD]
    assert [row["changes"] > 0 for row in rows] == [False, True, True]


@processes
@linux
def test_what_xds_clients_cost_is_measured() -> None:
    """A few clients of both variants and profiles, until the last has each change; as rows of Markdown."""
    lines = measure("control-plane")["rows"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        (variant, f"{profile} of 12", changed)
        for variant in ("sotw", "delta")
        for profile in ("all", "few")
        for changed in ("1", "3")
    ]
    assert all(0 < float(row[5]) <= float(row[6]) for row in rows)


@processes
def test_what_grpcs_own_xds_client_costs_is_measured() -> None:
    """Interceptors and channels against a bare one and an xds: one, told by our control plane."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.grpc_overhead", "--quick", "--json", "-"]
    ran = subprocess.run([*command, "--concurrency", "2"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = json.loads(ran.stdout)
    assert_well_formed(rows)
    assert {row["contestant"] for row in rows} >= {"grpcio", "grpcio, xds:///"}


@processes
@linux
def test_a_cluster_is_followed_and_told_of() -> None:
    """Ten services of three pods: each figure is there."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.kubernetes_scale", "--quick", "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stderr) == (0, "")
    told = json.loads(ran.stdout)
    assert (told["pods"], told["services"]) == (30, 10)
    times = [value for what, value in told.items() if not what.startswith("CPU")]  # its ticks are 10 ms: may be none
    assert "ms to the client, longest" in told and all(value > 0 for value in times)


# How a run is made and told


@processes
def test_a_run_keeps_its_rows_and_makes_the_page(tmp_path: Path) -> None:
    """By the command, each section by a process of its own; a warning would be a leak."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "benchmarks",
        "picks",
        "--effort",
        "smoke",
        "--folder",
        str(tmp_path),
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    kept = json.loads((tmp_path / "picks.json").read_text())
    assert_well_formed(kept["rows"])
    assert kept["failure"] == "" and kept["machine"]["python"]
    page = (tmp_path / "performance.md").read_text()
    assert "{{" not in page and "| least request | 10,000 |" in page and "This was a smoke run" in page


@processes
def test_a_section_that_takes_too_long_is_ended_and_told() -> None:
    """With what it has started."""
    told = measured("policy", SMOKE, 0.01)
    assert told["failure"] == "it was ended after 0 s" and told["rows"] == []


def test_a_section_that_fails_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failure is kept, and stands on the page."""
    rows = [{"policy": "random", "endpoints": 10, "microseconds": [1.0], "empty": [0.5], "rebuild_ms": [1.0]}]
    answers = {
        "calls": {"section": "calls", "effort": "full", "seconds": 1.0, "failure": "it broke", "rows": []},
        "picks": {"section": "picks", "effort": "full", "seconds": 1.0, "failure": "", "rows": rows},
    }
    monkeypatch.setattr("benchmarks.run.measured", lambda name, effort, limit: answers[name])
    assert run_sections(["calls", "picks"], SMOKE, tmp_path) == ["calls"]
    kept = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in answers}
    write(kept, tmp_path / "page" / "performance.md")
    page = (tmp_path / "page" / "performance.md").read_text()
    assert "**failed: it broke**" in page and "| random | 10 | 1.00 | 2.00 x | 1.00 |" in page


def _call(contestant: str, microseconds: list[float], client: str = "httpx, async", at_once: int = 1) -> dict[str, Any]:
    fields = ("p50_ms", "p99_ms", "cpu", "all_cpu")
    return {
        "client": client,
        "contestant": contestant,
        "concurrency": at_once,
        "microseconds": microseconds,
        **{field: [each / 1e3 for each in microseconds] for field in fields},
    }


def _target(found: dict[str, Any], what: str) -> Target:
    (one,) = [target for target in targets(found) if what in target.what]
    return one


def test_a_target_is_judged_by_the_run_and_by_the_pool_of_the_same_limits() -> None:
    """With every connection kept, the bare client takes 200: with 100, the mesh makes twice its requests. The default
    pool, which keeps 20 only, is told."""
    rows = [
        _call(calls.DEFAULT_POOL, [400.0, 400.0], at_once=32),
        _call(calls.BARE, [200.0, 220.0], at_once=32),
        _call(calls.MESHED, [100.0, 100.0], at_once=32),
        _call(calls.MESHED_AIOHTTP, [50.0, 50.0], at_once=32),
    ]
    told = {"calls": {"rows": rows}}
    core = _target(told, "httpcore's connections, all kept, at concurrency 32")
    assert core.is_met is True and core.measured == "2.1 (by its default pool: 4.0)"
    assert _target(told, "aiohttp's connections, all kept, at concurrency 32").is_met is False
    absent = _target(told, "httpcore's connections, all kept, at concurrency 128")
    assert (absent.is_met, absent.measured) == (None, "not in this run")


def test_without_a_run_no_target_is_met(tmp_path: Path) -> None:
    """None is known beforehand, and the page has no figure."""
    assert {target.is_met for target in targets({})} == {None}
    write({}, tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "There are no figures on this page yet" in page and "{{" not in page and ".svg" not in page


def test_less_latency_than_none_is_better_than_any_ratio() -> None:
    """A mesh that is quicker than httpx adds nothing that Envoy's could be divided by."""
    rows = [
        _call(instead.ALONE, [1000.0]),
        _call(instead.MESHED_TLS, [900.0]),
        _call(instead.pair("Envoy"), [1500.0]),
    ]
    told = _target({"instead": {"rows": rows}}, "an Envoy pair adds")
    assert told.is_met is True and told.measured.startswith("Envoy +500 µs, the mesh -100 µs")
    rows[1] = _call(instead.MESHED_TLS, [1100.0])
    told = _target({"instead": {"rows": rows}}, "an Envoy pair adds")
    assert told.is_met is False and told.measured.startswith("5.0 ")


def test_what_is_slower_with_the_mesh_is_told_the_worst_first() -> None:
    """And what is quicker is not."""
    rows = [
        *(_call(calls.BARE, [100.0]), _call(calls.MESHED, [90.0])),
        *(_call(calls.BARE, [100.0], "aiohttp"), _call(calls.MESHED, [200.0], "aiohttp")),
        *(_call(calls.BARE, [100.0], "urllib3"), _call(calls.MESHED, [130.0], "urllib3")),
    ]
    told = losses({"calls": {"rows": rows}})
    assert [(loss.what.partition(",")[0], round(loss.ratio, 2)) for loss in told if loss.what.endswith("time")] == [
        ("aiohttp", 2.0),
        ("urllib3", 1.3),
    ]


def test_plots_are_drawings_and_old_ones_go(tmp_path: Path) -> None:
    """Beside the page, in XML that a browser reads."""
    (tmp_path / "performance").mkdir()
    (tmp_path / "performance" / "gone.svg").write_text("old")
    rows = [_call(calls.BARE, [100.0]), _call(calls.MESHED, [90.0])]
    write(
        {"calls": {"rows": rows, "machine": _MACHINE, "effort": "full", "failure": "", "seconds": 1.0}},
        tmp_path / "p.md",
    )
    drawn = [path.name for path in (tmp_path / "performance").iterdir()]
    assert drawn == ["calls.svg"] and "(performance/calls.svg)" in (tmp_path / "p.md").read_text()
    root = ElementTree.fromstring((tmp_path / "performance" / "calls.svg").read_text())
    assert root.tag.endswith("svg") and "1.11" in "".join(root.itertext())


_MACHINE = {
    **dict.fromkeys(("date", "processor", "memory", "system", "python", "commit"), "?"),
    "cores": 2,
    "load": 0.0,
    "libraries": [],
    "tools": [],
}


def test_figures_are_taken_round_by_round() -> None:
    """The median of ratios, nearest-rank percentiles, CPU for 1,000 requests."""
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
    assert [percentile([1.0, 2.0, 3.0, 4.0], each) for each in (50, 99, 100)] == [2.0, 4.0, 4.0]
    one = row_of_rounds("c", "x", 2, [Round(1.0, [0.5, 0.1, 0.3, 0.2], 0.4, 0.2)])
    assert (one.microseconds, one.p50_ms, one.p99_ms) == ([250_000.0], [200.0], [500.0])
    assert one.cpu == [pytest.approx(100.0)] and one.all_cpu == [pytest.approx(150.0)]


def test_a_missing_tool_says_how_to_get_it() -> None:
    """Its rows are left out with this."""
    with pytest.raises(Missing, match="apt-get install no-such-proxy"):
        found("no-such-proxy")
