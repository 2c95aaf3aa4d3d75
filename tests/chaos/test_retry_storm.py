"""How much does the mesh add to the load of a service that is down?"""

from __future__ import annotations

import asyncio
from pathlib import Path

import meshlib
from chaos.recording import Promising
from peers import Answer, Peer, Received

AT_ONCE, SERVICE_TIME = 64, 0.02

CONFIGURATION = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: down}}
spec:
  hosts: [down.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: down}}
spec:
  host: down.example.com
  trafficPolicy: {policy}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: down}}
spec:
  hosts: [down.example.com]
  http:
  - route: [{{destination: {{host: down.example.com}}}}]
    retries: {{attempts: 5, retryOn: 5xx, backoff: 1ms}}
"""


async def growth(tmp_path: Path, policy: str, calls: int) -> float:
    """Requests that the service saw, by calls that were made, while it answered 503 to all."""
    seen = 0

    async def down(_: Received) -> Answer:
        nonlocal seen
        seen += 1
        await asyncio.sleep(SERVICE_TIME)  # its tries take time even though they fail
        return Answer(503)

    with Peer(down) as peer:
        (tmp_path / "mesh.yaml").write_text(CONFIGURATION.format(port=peer.port, policy=policy))
        with meshlib.connect(tmp_path) as mesh:
            gate = asyncio.Semaphore(AT_ONCE)
            async with mesh.AsyncClient(timeout=60) as client:

                async def one() -> int:
                    async with gate:
                        return (await client.get("http://down.example.com/")).status_code

                statuses = await asyncio.gather(*(one() for _ in range(calls)))
    assert set(statuses) == {503}
    return seen / calls


async def test_without_a_budget_retries_multiply_the_load(tmp_path: Path) -> None:
    """The danger: five retries mean six times the requests, at the worst moment."""
    assert await growth(tmp_path, "{}", 200) == 6.0


async def test_a_budget_of_20_percent_adds_at_most_20_percent(tmp_path: Path, promise: Promising) -> None:
    """And it is used: some calls are tried again."""
    async with promise(
        "A retry budget of 20 percent adds at most 20 percent to the load of a service that is down",
        f"1,500 calls, {AT_ONCE} at once, five retries each, a service that answers 503 to all",
    ) as told:
        measured = await growth(tmp_path, "{retryBudget: {percent: 20, minRetryConcurrency: 0}}", 1500)
        told.measured("requests for each call", measured, "", at_most=1.2)
        assert measured > 1.05
