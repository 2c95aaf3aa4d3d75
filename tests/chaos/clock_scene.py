"""What a process does whose wall clock is set: run with clock_shim.c by test_clock_that_is_set, and tells it as JSON.

    python clock_scene.py FOLDER OFFSET_FILE INTERVAL

One line a step. Only the wall clock is shifted, so `time.monotonic()` measures true.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from joserfc import jwt
from joserfc.jwk import RSAKey

import meshlib
from chaos.secured import Pair, control_plane, pair
from inbound.inbound_servers import uvicorn_server
from meshlib.controlplane.server import ControlPlane
from meshlib.identity import ca_client
from meshlib.identity.credentials import Credentials
from peers import Answer, Peer, Received

HOUR, DAY = 3600, 86400
PATIENCE = 90.0
ROUTES = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: two}}
spec:
  hosts: [two.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {bad}}}}}, {{address: 127.0.0.1, ports: {{http: {good}}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: two}}
spec:
  host: two.example.com
  trafficPolicy:
    loadBalancer: {{simple: ROUND_ROBIN}}
    outlierDetection: {{consecutive5xxErrors: 1, interval: 0.1s, baseEjectionTime: 300s, maxEjectionPercent: 50}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: two}}
spec:
  hosts: [two.example.com]
  http: [{{route: [{{destination: {{host: two.example.com}}}}], timeout: 2s}}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec: {{jwtRules: [{{issuer: tester, jwks: '{keys}'}}]}}
"""


def tell(step: str, **found: Any) -> None:
    print(json.dumps({"step": step, **found}), flush=True)


class Clock:
    def __init__(self, file: Path) -> None:
        self.file = file

    def set(self, offset: int) -> None:
        """Seconds from the true time."""
        with self.file.open("r+b") as file:
            file.write(offset.to_bytes(8, sys.byteorder, signed=True))
        off = time.time() - STARTED - (time.monotonic() - BEGAN)
        assert abs(off - offset) < 60, f"the wall clock is {off:g} s off, and {offset} were asked for"


STARTED, BEGAN = time.time(), time.monotonic()


def until_secured(town: Pair, known: Credentials | None = None) -> tuple[float, list[str]]:
    """Seconds until calls come through, by certificates that hold and another one than `known`; and how those before
    failed."""
    began, failures = time.monotonic(), dict[str, None]()
    while True:
        failure = town.failure()
        held = [each.credentials for each in (town.caller, town.reviews)]
        now = time.time()
        holds = all(each is not None and each.not_before <= now < each.not_after for each in held)
        if not failure and holds and held[0] is not known:
            return time.monotonic() - began, [*failures]
        if failure:
            failures[failure] = None
        assert time.monotonic() - began < PATIENCE, [*failures]
        time.sleep(0.05)


def certificates(clock: Clock, folder: Path, plane: ControlPlane) -> None:
    """18 hours are more than half of a certificate's life; two days more than all of it, so that a join token has to
    prove who this is, and so it has once the certificate's life is still to come."""
    with pair(plane, folder) as town:
        until_secured(town)
        for step, hours in (("18 hours forward", 18), ("two days forward", 48), ("one day back", 24)):
            town.seen.clear()
            known = town.caller.credentials
            clock.set(hours * HOUR)
            if hours != 18:
                town.rejoin(plane, folder)
            seconds, failures = until_secured(town, known)
            tell(step, seconds=seconds, failures=failures, seen=sorted(set(town.seen)))
        clock.set(0)


def engine(clock: Clock, folder: Path) -> None:
    held = threading.Event()

    async def slow_or_not(received: Received) -> Answer:
        if received.target == "/slow":
            held.set()
            await asyncio.sleep(60)
        return Answer(body=b"good")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    key = RSAKey.generate_key(2048, {"kid": "1"})
    token = jwt.encode(
        {"alg": "RS256", "kid": "1"}, {"iss": "tester", "sub": "me", "exp": int(time.time()) + 3600}, key
    )
    keys = json.dumps({"keys": [key.as_dict(private=False)]})
    with Peer(lambda _: Answer(503)) as bad, Peer(slow_or_not) as good:
        (folder / "mesh.yaml").write_text(ROUTES.format(bad=bad.port, good=good.port, keys=keys))
        with (
            meshlib.connect(folder) as mesh,
            mesh.Client(timeout=60) as client,
            uvicorn_server(mesh.asgi(app)) as url,
        ):
            statuses = [client.get("http://two.example.com/").status_code for _ in range(4)]
            asked = len(bad.received)
            took: list[tuple[int, float]] = []

            def call_slowly() -> None:
                began = time.monotonic()
                status = client.get("http://two.example.com/slow").status_code
                took.append((status, time.monotonic() - began))

            def with_token() -> int:
                headers = {"authorization": f"Bearer {token}"}
                return httpx.get(url, headers=headers, trust_env=False, timeout=30).status_code

            tokens = [with_token()]
            caller = threading.Thread(target=call_slowly)
            caller.start()
            assert held.wait(30)
            clock.set(DAY)
            tokens.append(with_token())
            statuses += [client.get("http://two.example.com/").status_code for _ in range(10)]
            clock.set(-DAY)
            statuses += [client.get("http://two.example.com/").status_code for _ in range(10)]
            clock.set(0)
            tokens.append(with_token())
            caller.join(60)
            tell(
                "engine",
                slow=took,
                failed=statuses.count(503),
                asked_again=len(bad.received) - asked,
                tokens=tokens,
            )


async def main(folder: Path, clock: Clock) -> None:
    plane = control_plane(folder, 0)
    await plane.start()
    try:
        await asyncio.to_thread(certificates, clock, folder, plane)
    finally:
        await plane.stop()


if __name__ == "__main__":
    ca_client.CLOCK_INTERVAL = float(sys.argv[3])
    there = Path(sys.argv[1])
    (there / "engine").mkdir()
    engine(Clock(Path(sys.argv[2])), there / "engine")
    asyncio.run(main(there, Clock(Path(sys.argv[2]))))
