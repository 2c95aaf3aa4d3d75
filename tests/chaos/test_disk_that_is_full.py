"""Does a process whose disk is full go on, say so once, and keep the last configuration that fitted?"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chaos.ledgers import Ledgers
from chaos.recording import IS_FULL, Promising
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

ENTRY = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: ledger}}
spec:
  hosts: [ledger.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
"""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """64 kB of tmpfs; skips where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root that may mount a tmpfs (in a container: --cap-add SYS_ADMIN)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def limited(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    yield folder


@pytest.mark.parametrize("disk", ["file size limit", *["no space left"] * IS_FULL])
async def test_a_full_disk_costs_the_memory_and_nothing_else(tmp_path: Path, promise: Promising, disk: str) -> None:
    """What was kept before stays whole: the file is replaced, or it is not."""
    async with promise(
        "A process whose disk is full follows its configuration, says once that it can't be kept, keeps the last one "
        "that fitted whole and leaves no torn file, and keeps the next one when there is room again",
        "a tmpfs of 64 kB filled to the last byte"
        if disk == "no space left"
        else "a limit of 500 bytes for a file (RLIMIT_FSIZE)",
    ) as told:
        config = tmp_path / "config"
        config.mkdir()
        opened = small_disk if disk == "no space left" else limited
        with opened(tmp_path / "disk") as cache, Ledgers(tmp_path / "servers", 1) as servers:
            (config / "entry.yaml").write_text(ENTRY.format(port=servers.ports[0]))
            plane = ControlPlane(ControlPlaneSettings((config,), xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
            await plane.start()
            try:
                how = str(cache / "filler") if disk == "no space left" else "500"
                scene = await asyncio.create_subprocess_exec(
                    *(sys.executable, str(Path(__file__).with_name("disk_scene.py")), plane.xds_address),
                    *(str(config / "routes.yaml"), str(cache), how),
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )
                said, errors = await scene.communicate()
            finally:
                await plane.stop()
        assert scene.returncode == 0, errors.decode()
        found = json.loads(said)
        assert found["kept"] == ["1", "1", "1", "4"]
        assert found["left"] == []
        assert len(found["said"]) == 1 and "can't be kept" in found["said"][0], found["said"]
        told.counted("edits followed", 4)
        told.counted("lines of the log", 1)
