"""Does a process grow that calls and calls, while its configuration changes?"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from chaos.ledgers import Ledgers
from chaos.recording import IS_FULL, Promising

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

CALLS, ROUNDS = (10_000, 20) if IS_FULL else (320, 6)
"""Calls for each edit of the configuration, and edits."""


async def test_a_process_that_calls_and_calls_does_not_grow(tmp_path: Path, promise: Promising) -> None:
    """The second half of a run is judged: in the first, pools and caches fill up."""
    async with promise(
        "Memory does not grow with the number of calls, nor with that of changes of the configuration",
        f"{CALLS * ROUNDS:,} calls by three kinds of client, {ROUNDS} edits of endpoints and routes meanwhile",
    ) as told:
        with Ledgers(tmp_path / "servers", 2) as servers:
            config = tmp_path / "config"
            config.mkdir()
            scene = await asyncio.create_subprocess_exec(
                *(sys.executable, str(Path(__file__).with_name("growth_scene.py")), str(config)),
                *(str(CALLS), str(ROUNDS), *map(str, servers.ports)),
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            said, errors = await scene.communicate()
        assert scene.returncode == 0, errors.decode()
        found = json.loads(said)
        assert found["failures"] == 0
        memories, objects = found["memories"], found["objects"]
        half = ROUNDS // 2
        told.counted("calls that failed", 0)
        told.measured("memory after the first half", memories[half - 1] / 1e6, "MB")
        # An object for each call, or a snapshot for each edit, would be many times as much.
        grown = (max(objects[half:]) - max(objects[:half])) / (CALLS * (ROUNDS - half))
        bound = 0.1 if IS_FULL else 0.5
        told.measured("objects more for each call of the second half", max(0.0, grown), "", at_most=bound)
        if IS_FULL:
            more = (memories[-1] - memories[half - 1]) / (CALLS * (ROUNDS - half))
            told.measured("bytes more for each call of the second half", max(0.0, more), "B", at_most=30.0)
