"""What does a new connection cost, and what one that is kept? `python -m benchmarks.mtls`: GETs by httpx.Client, with
and without mTLS, bare and through the mesh. The server is a process of its own; contestants take turns round by
round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.effort import EFFORTS, FULL, SMOKE, Effort
from benchmarks.identities import CLIENT, SERVER, stock_context, write_identities
from benchmarks.mesh_config import PLAIN_URL, SECURED_URL, mesh_of, mesh_yaml
from benchmarks.processes import module

BARE, BARE_TLS, MESHED, MESHED_TLS = "httpx", "httpx, mTLS", "meshed", "meshed, mTLS"
NEW, NEW_TLS = "httpx, new connection", "httpx, mTLS, new connection"


def measure(effort: Effort) -> dict[str, Any]:
    """Microseconds a call, by round."""
    times, rounds = (2, 1) if effort.name == SMOKE.name else (effort.size // 2, effort.rounds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_identities(folder)
        server = stack.enter_context(module("benchmarks.server", "0", str(folder / SERVER)))
        mesh = stack.enter_context(mesh_of(folder, mesh_yaml(*server.ports), prometheus=""))
        context = stock_context(folder / CLIENT)
        plain, secured = (
            f"{kind}://127.0.0.1:{port}/" for kind, port in zip(("http", "https"), server.ports, strict=True)
        )
        bare = stack.enter_context(httpx.Client(verify=context, trust_env=False))
        meshed = stack.enter_context(mesh.Client())

        def anew(url: str) -> None:
            with httpx.Client(verify=context, trust_env=False) as client:
                client.get(url)

        contestants: dict[str, tuple[Callable[[], object], int]] = {
            BARE: (partial(bare.get, plain), times),
            BARE_TLS: (partial(bare.get, secured), times),
            MESHED: (partial(meshed.get, PLAIN_URL), times),
            MESHED_TLS: (partial(meshed.get, SECURED_URL), times),
            NEW: (partial(anew, plain), max(1, times // 10)),
            NEW_TLS: (partial(anew, secured), max(1, times // 10)),
        }
        took: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):  # the first warms up
            for name, (call, repetitions) in contestants.items():
                started = time.perf_counter()
                for _ in range(repetitions):
                    call()
                if number:
                    took[name].append((time.perf_counter() - started) / repetitions * 1e6)
    return {"rows": [{"what": name, "microseconds": found} for name, found in took.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", choices=EFFORTS, default=FULL.name)
    rows = measure(EFFORTS[parser.parse_args().effort])["rows"]
    found = {row["what"]: statistics.median(row["microseconds"]) for row in rows}
    for name, microseconds in found.items():
        print(f"{name:30} {microseconds:8.0f} us   {microseconds / found[BARE]:5.2f} x httpx")


if __name__ == "__main__":
    main()
