"""Measures, section by section, and writes the report: `python -m benchmarks`, which is `make bench`.

Each section runs in a process of its own: what fails or takes too long is told, and the others' rows stay. Rows are
written as JSON to build/bench, from where the report is made: docs/performance.md with its plots after a full run,
build/bench-fast/performance.md after a fast one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.effort import EFFORTS, FAST, FULL, Effort
from benchmarks.machine import described
from benchmarks.sections import SECTIONS

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
TOTAL = {FULL.name: 1200.0, FAST.name: 180.0}
"""Seconds for all sections together; what is left then is not begun."""


def section_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def measured(name: str, effort: Effort, limit: float) -> dict[str, Any]:
    """By a process of its own, and its children, which are ended after `limit` seconds."""
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", "benchmarks", "--only", name]
    began = time.monotonic()
    with subprocess.Popen(
        [*command, "--effort", effort.name], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
            failure = "" if process.returncode == 0 else f"its process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, failure = "", f"it was ended after {limit:.0f} s"
    found: dict[str, Any] = {"rows": []}
    if not failure:
        found = json.loads(printed.splitlines()[-1])
    return {"section": name, "effort": effort.name, "seconds": time.monotonic() - began, "failure": failure, **found}


def run(names: Sequence[str], effort: Effort, folder: Path) -> list[str]:
    """Writes each section's rows to `folder`; returns those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.monotonic()
    for name in names:
        machine = described()
        left = TOTAL.get(effort.name, 1200.0) - (time.monotonic() - began)
        print(f"{name:14} ", end="", flush=True, file=sys.stderr)
        if left <= 5.0:
            found: dict[str, Any] = {"section": name, "effort": effort.name, "seconds": 0.0, "rows": []}
            found["failure"] = "no time was left for it"
        else:
            found = measured(name, effort, min(SECTIONS[name].limit, left))
        told = found["failure"] or "; ".join(f"without {what}: {why}" for what, why in found.get("skipped", {}).items())
        print(f"{found['seconds']:6.1f} s  {told}", file=sys.stderr)
        section_file(folder, name).write_text(json.dumps({**found, "machine": machine}, indent=1) + "\n")
        if found["failure"]:
            failed.append(name)
    return failed


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The sections that have been measured, by name."""
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in SECTIONS
        if (file := section_file(folder, name)).exists()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--effort", choices=EFFORTS, default=FULL.name, help="smoke only shows that it runs")
    parser.add_argument("--folder", type=Path, help="where the rows go, and the report of what is not a full run")
    parser.add_argument("--only", choices=SECTIONS, help="measure in this process, and print JSON")
    parser.add_argument("--page", type=Path, help="write the report there; its plots go into a folder beside it")
    parser.add_argument("--report", action="store_true", help="make the report of rows that are there; measure nothing")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"no section {unknown.pop()!r}; there are {', '.join(SECTIONS)}")
    effort = EFFORTS[chosen.effort]
    if chosen.only:
        found = importlib.import_module(f"benchmarks.{SECTIONS[chosen.only].module}").measure(effort)
        print(json.dumps(found))
        return
    from benchmarks.report import write  # it knows all sections: a process that measures one should not load the others

    folder = chosen.folder or BUILD / ("bench" if effort is FULL else f"bench-{effort.name}")
    failed = [] if chosen.report else run(chosen.sections or list(SECTIONS), effort, folder)
    found_all = read(folder)
    is_whole = effort is FULL and set(found_all) == set(SECTIONS)
    page = chosen.page or (ROOT / "docs" if is_whole else folder) / "performance.md"
    write(found_all, page)
    print(f"wrote {page}", file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
