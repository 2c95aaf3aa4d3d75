"""The benchmarks run and report every row; what they measure is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshlib.model import LoadBalancing

ROOT = Path(__file__).parents[2]
BARE = ("httpx", "httpx, every connection kept")
MODES = {
    "sync": [*BARE, "tenacity and pybreaker by hand", "meshed"],
    "async": [*BARE, "tenacity and pybreaker by hand", "meshed, httpcore", "meshed, aiohttp"],
}

OTHERS = ("requests", "urllib3", "aiohttp")


def run(*arguments: str) -> str:
    """As `make bench` does; a warning would be a leak, so each is an error."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--quick", *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout


@pytest.mark.processes
def test_every_contestant_is_measured_at_every_concurrency() -> None:
    """In both modes, with the two engines where there are two, and each with numbers that can be."""
    found = json.loads(run("--concurrency", "1", "4", "--json", "-"))
    measured = [(row["mode"], row["concurrency"], row["contestant"]) for row in found["calls"]]
    assert measured == [
        (mode + against, at_once, name)
        for mode in MODES
        for against, at_once in (("", 1), ("", 4), ("+10", 4))
        for name in MODES[mode]
    ] + [
        (library, at_once, name) for at_once in (1, 4) for library in OTHERS for name in (library, f"{library}, meshed")
    ]
    for row in found["calls"]:
        assert row["microseconds"] > 0 and row["ratio"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"]
    added = {row["what"]: row["added"] for row in found["policy"]}
    assert [what for what, cost in added.items() if cost is None] == [
        "httpx.Client",
        "httpx.AsyncClient",
        "a function",
        "a coroutine",
        "the core alone (policy.call)",
        "ASGI application",
        "WSGI application",
    ]
    assert all(row["microseconds"] > 0 for row in found["policy"])


@pytest.mark.processes
def test_the_tables_are_printed_and_written(tmp_path: Path) -> None:
    """What a person reads, and the same rows for a machine."""
    text = run("--concurrency", "1", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    for row in rows["calls"]:
        assert row["contestant"] in text
    for row in rows["policy"]:
        assert row["what"] in text


@pytest.mark.processes
def test_every_policy_picks_at_every_size() -> None:
    """Three sizes each."""
    found = json.loads(run("--only", "picks", "--json", "-"))
    assert not found["calls"]
    assert [(row["policy"], row["endpoints"]) for row in found["picks"]] == [
        (policy.lower(), size) for policy in LoadBalancing for size in (10, 1_000, 10_000)
    ]
    assert all(row["microseconds"] > 0 and row["ratio"] > 0 and row["rebuild_ms"] > 0 for row in found["picks"])


@pytest.mark.processes
def test_what_mtls_costs_is_measured() -> None:
    """With and without, bare and meshed."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.mtls", "--quick"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    assert [line.partition("  ")[0] for line in found.stdout.splitlines()] == [
        "httpx",
        "httpx, mTLS",
        "meshed",
        "meshed, mTLS",
        "httpx, new connection",
        "httpx, mTLS, new connection",
    ]


@pytest.mark.processes
def test_what_grpc_calls_cost_is_measured() -> None:
    """Interceptors and channels against a bare one, and gRPC's own xDS client, told by our control plane."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.grpc_overhead", "--quick", "--json", "-"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    rows = json.loads(found.stdout)
    contestants = (
        "grpcio",
        "grpcio, interceptors",
        "channel of the mesh",
        "channel of the mesh, measured",
        "grpcio, xds:///",
    )
    assert [(row["mode"], row["concurrency"], row["contestant"]) for row in rows] == [
        (mode, at_once, name) for mode in ("sync", "async") for at_once in (1, 16) for name in contestants
    ]
    assert all(row["microseconds"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.processes
def test_what_authorization_costs_is_measured() -> None:
    """Decisions, and requests through both kinds of middleware."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.authorization", "--quick"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    names = [line[:42].strip() for line in found.stdout.splitlines()]
    assert names[:2] == ["no rules", "1 policy"] and names[-2:] == ["ASGI, 100 policies", "WSGI, 100 policies"]
    assert len(names) == 12


@pytest.mark.processes
def test_what_beginning_costs_is_measured() -> None:
    """Imports and first calls, each by a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.startup", "--quick"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    assert [line[:32].strip() for line in found.stdout.splitlines()[1:]] == [
        "python",
        "import httpx",
        "import meshlib",
        "import grpc",
        "httpx, first call",
        "meshed, first call",
        "meshlib.instrument, first call",
    ]


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_xds_clients_cost_is_measured() -> None:
    """A few clients of both variants and profiles, until the last has each change; as rows of Markdown."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.xds_clients", "--quick"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.stdout.splitlines()[2:]]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        (variant, f"{profile} of 12", changed)
        for variant in ("sotw", "delta")
        for profile in ("all", "few")
        for changed in ("1", "3")
    ]
    assert all(0 < float(row[5]) <= float(row[6]) for row in rows)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cluster_is_followed_and_told_of() -> None:
    """Ten services of three pods: each figure is there."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks.kubernetes_scale", "--quick", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    figures = json.loads(found.stdout)
    assert (figures["pods"], figures["services"]) == (30, 10)
    assert len(figures) == 8 and all(value > 0 for value in figures.values())
