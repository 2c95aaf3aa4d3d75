"""What a process does whose disk is full, told as one line of JSON.

    python disk_scene.py TARGET CONFIG CACHE LIMIT|FILLER

LIMIT: bytes of a file that may not be exceeded while the disk is full (RLIMIT_FSIZE); or FILLER, a file on the disk of
CACHE that is grown until nothing fits any more.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

import meshlib
from e2e.town import eventually
from meshlib.discovery import xds
from meshlib.discovery.disk_cache import DiskCache, Memory

ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: ledger}}
spec:
  hosts: [ledger.example.com]
  http:
  - headers: {{response: {{set: {{x-edit: "edit-{edit}"}}}}}}
    route: [{{destination: {{host: ledger.example.com}}}}]
"""


def fill(how: str) -> None:
    if how.isdigit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), resource.RLIM_INFINITY))
        return
    with Path(how).open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def empty(how: str) -> None:
    if how.isdigit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        os.truncate(how, 0)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def main(target: str, config: Path, cache: Path, how: str) -> None:
    warnings, tries = Warnings(), 0
    logging.getLogger("meshlib").addHandler(warnings)
    save = DiskCache.save

    def counted(self: DiskCache, memory: Memory) -> None:
        nonlocal tries
        save(self, memory)
        tries += 1

    DiskCache.save = counted  # type: ignore[method-assign]
    xds.SAVE_AFTER = 0.1
    kept: list[str] = []
    with meshlib.connect(target, workload="caller", cache_dir=str(cache)) as mesh, mesh.Client(timeout=60) as client:

        def edit(number: int) -> None:
            """Returns once calls see it and the cache has tried to keep it."""
            before = tries
            draft = config.with_suffix(".tmp")
            draft.write_text(ROUTES.format(edit=number))
            draft.replace(config)
            eventually(
                lambda: client.get("http://ledger.example.com/").headers.get("x-edit") == f"edit-{number}", "seen"
            )
            eventually(lambda: tries > before, "tried to keep")
            time.sleep(0.1)
            (file,) = cache.glob("*.xds")
            fresh = DiskCache(cache, target, mesh.node)
            fresh.path = file
            memory = fresh.load()
            resources = memory.resources.values() if memory is not None else ()
            text = b"".join(each or b"" for of in resources for each in of.values())
            kept.append(next((str(each) for each in range(1, 5) if b"edit-%d" % each in text), ""))

        edit(1)
        fill(how)
        edit(2)
        edit(3)
        left = sorted(each.name for each in cache.iterdir() if each.suffix == ".new")
        empty(how)
        edit(4)
    print(json.dumps({"kept": kept, "said": warnings.said, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
