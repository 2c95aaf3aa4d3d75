"""On what was it measured? The machine, in the words that a reader needs to judge figures by."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "grpcio", "uvicorn", "tenacity", "pybreaker")
BENCH = ("opentelemetry-instrumentation-httpx",)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1024**3:.0f} GiB"
    except (OSError, ValueError):
        return "?"


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return ""


def _tools() -> list[str]:
    """What the proxies say of themselves; nothing of those that are not there."""
    from benchmarks.sidecars import Missing, found

    told = []
    for tool, option in (("envoy", "--version"), ("haproxy", "-v"), ("nginx", "-v")):
        try:
            ran = subprocess.run([found(tool), option], capture_output=True, text=True, timeout=20)
        except (Missing, OSError, subprocess.TimeoutExpired):
            continue
        lines = [line.strip() for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
        if not lines:
            continue
        said = lines[0].partition("version")[2].strip(" :/") or lines[0]
        version = said.split("/")[1] if tool == "envoy" and "/" in said else said.split()[0].removeprefix("nginx/")
        told.append(f"{tool} {version}")
    return told


def described() -> dict[str, Any]:
    """With the load before anything of ours began: a busy machine's ratios are rough, and its times are no times."""
    root = Path(__file__).parents[1]
    ran = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": [version for name in (*LIBRARIES, *BENCH) if (version := _version(name))],
        "tools": _tools(),
        "commit": ran.stdout.strip(),
        "load": round(os.getloadavg()[0], 2),
    }
