"""What does a process do whose wall clock is set, by days, forward and back?"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.recording import IS_FULL, Promising
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

INTERVAL = 10.0 if IS_FULL else 0.5
"""Seconds between two looks at the wall clock; 10 unless a test says otherwise."""


def shim(folder: Path) -> Path:
    """The library that shifts the wall clock of whoever loads it. Skips where it can't be had."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler: apt-get install gcc libc6-dev")
    made, source = folder / "clock.so", Path(__file__).with_name("clock_shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source)], check=True, timeout=60)
    return made


async def test_a_clock_that_is_set_moves_no_timer_and_costs_no_identity(tmp_path: Path, promise: Promising) -> None:
    """Timers are for durations, and no clock that can be set measures these; certificates and tokens end by the wall
    clock, so they are looked at again."""
    async with promise(
        f"A wall clock that is set moves no timeout and no ejection; tokens expire by it; a certificate that is due by "
        f"the new time is renewed within {INTERVAL:g} s and a call to the CA, before it has expired if it can be; one "
        f"that does not hold any more, or not yet, is replaced as soon as a join token allows it; nothing is sent in "
        f"plaintext",
        "the clock of a process and its control plane is set: 18 hours and two days forward, one day back",
    ) as told:
        library = shim(tmp_path)
        offset = tmp_path / "offset"
        offset.write_bytes(bytes(8))
        script = Path(__file__).with_name("clock_scene.py")
        scene = await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), str(tmp_path), str(offset), str(INTERVAL)),
            env={
                **os.environ,
                "PYTHONPATH": str(script.parents[1]),
                "LD_PRELOAD": str(library),
                "MESHLIB_TEST_CLOCK": str(offset),
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, errors = await scene.communicate()
        assert scene.returncode == 0, errors.decode()
        found = {each.pop("step"): each for each in map(json.loads, said.decode().splitlines())}
        ((status, seconds),) = found["engine"]["slow"]
        assert (status, found["engine"]["asked_again"], found["engine"]["failed"]) == (504, 0, 1)
        assert found["engine"]["tokens"] == [200, 401, 200]
        assert seconds >= 1.9
        told.measured("a timeout of 2 s, with the clock set meanwhile", seconds, at_most=within(5.0))
        assert found["18 hours forward"]["failures"] == [], "renewed before it has expired"
        assert all("has expired" in each for each in found["two days forward"]["failures"])
        for step in ("18 hours forward", "two days forward", "one day back"):
            assert set(found[step]["seen"]) <= {"spiffe://cluster.local/ns/default/sa/caller"}, "never plaintext"
            told.measured(f"{step}: calls by mTLS again after", found[step]["seconds"], at_most=within(INTERVAL + 10))
