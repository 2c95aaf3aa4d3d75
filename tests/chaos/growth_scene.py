"""Does a process grow that calls and calls, while its configuration changes? One line of JSON tells.

    python growth_scene.py CONFIG CALLS ROUNDS PORT PORT

After each round of CALLS the configuration is another: endpoints come and go, and routes with them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
import threading
from pathlib import Path

import httpx

import meshlib
from chaos.ledgers import HOST, configuration

AT_ONCE = 16


def memory() -> int:
    """Resident, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def edit(config: Path, turn: int, ports: list[int]) -> None:
    """Both endpoints, the one or the other, by routes that no earlier edit had."""
    chosen = [ports, ports[:1], ports[1:]][turn % 3]
    text = configuration(chosen, attempts=1 + turn % 4, per_try=20.0, ejection=1.0 + turn)
    route = f"  - match: [{{uri: {{prefix: /never-{turn}/}}}}]\n    directResponse: {{status: 500}}\n"
    draft = config / "mesh.tmp"
    draft.write_text(text.replace("  http:\n", "  http:\n" + route, 1))
    draft.replace(config / "mesh.yaml")


async def main(config: Path, calls: int, rounds: int, ports: list[int]) -> None:
    edit(config, 0, ports)
    memories, objects, failures = [], [], 0
    with meshlib.connect(config, cache_dir="-") as mesh, mesh.Client(timeout=60) as threaded:
        transport = mesh.async_transport(engine="aiohttp")
        async with httpx.AsyncClient(transport=transport, timeout=60) as fast, mesh.AsyncClient(timeout=60) as usual:

            async def some(client: httpx.AsyncClient, count: int) -> None:
                nonlocal failures
                for _ in range(count):
                    failures += (await client.get(HOST)).status_code != 200

            def some_by_thread(count: int) -> None:
                nonlocal failures
                for _ in range(count):
                    failures += threaded.get(HOST).status_code != 200

            await some(usual, 1)
            for turn in range(rounds):
                seen = mesh.live
                edit(config, turn + 1, ports)
                async with asyncio.timeout(60):
                    await mesh.next_live(seen)
                share = calls // AT_ONCE
                await asyncio.gather(
                    *(some(fast, share) for _ in range(AT_ONCE - 2)),
                    some(usual, share),
                    asyncio.to_thread(some_by_thread, share),
                )
                gc.collect()
                memories.append(memory())
                objects.append(len(gc.get_objects()))
    print(
        json.dumps(
            {
                "memories": memories,
                "objects": objects,
                "failures": failures,
                "threads": threading.active_count(),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(each) for each in sys.argv[4:]]))
