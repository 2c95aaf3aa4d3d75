"""What does a control plane pay for a thousand clients? The rows of xds_clients.py, as it prints them."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.effort import FAST, FULL, SMOKE, Effort

_ARGUMENTS = {
    FULL.name: ("--clients", "1000", "--services", "1000", "--changed", "1", "100", "--rounds", "10", "--seconds", "8"),
    FAST.name: ("--clients", "50", "--services", "100", "--changed", "1", "--rounds", "3", "--seconds", "2"),
    SMOKE.name: ("--quick",),
}
LONGEST = {FULL.name: 300.0, FAST.name: 60.0, SMOKE.name: 100.0}
"""Seconds, after which the rows that are there have to do."""


def measure(effort: Effort) -> dict[str, Any]:
    arguments, skipped = _ARGUMENTS[effort.name], {}
    command = [sys.executable, "-m", "benchmarks.xds_clients", *arguments]
    with tempfile.TemporaryFile("w+") as printed, subprocess.Popen(command, stdout=printed) as process:
        try:
            process.wait(LONGEST[effort.name])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that it ends its control plane
            process.wait()
            skipped["rows"] = f"it was ended after {LONGEST[effort.name]:.0f} s"
        else:
            if process.returncode:
                raise RuntimeError(f"benchmarks.xds_clients ended with {process.returncode}")
        printed.seek(0)
        rows = [line.rstrip() for line in printed if line.startswith("|")]
    return {"arguments": list(arguments), "rows": rows, "skipped": skipped}
