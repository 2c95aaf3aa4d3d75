"""What becomes of calls by name while no name server answers? Real packets, to a name server that is killed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import meshlib
from chaos.ledgers import Ledgers, calling
from chaos.recording import IS_FULL, Promising
from discovery.name_server import NameServer
from peers import unused_port
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

RATE, OUTAGE = (200.0, 20.0) if IS_FULL else (50.0, 2.0)


async def test_what_was_last_known_serves_while_no_name_server_answers(tmp_path: Path, promise: Promising) -> None:
    """Its records have a TTL of a second, so it is missed at once."""
    async with promise(
        "While no name server answers, what it last said goes on to serve, though it has expired; what it says once "
        "it is back is used",
        f"the name server of a host (TTL 1 s) is gone for {OUTAGE:g} s at {RATE:g} calls a second, and is back with "
        f"another address",
    ) as told:
        port, old, new = unused_port(), "127.0.0.1", "127.0.0.2"
        with Ledgers(tmp_path, 2, [(old, port), (new, port)]) as servers:
            with NameServer() as server:
                server.set(f"ledger.test. 1 A {old}")
                at = server.port
                mesh = meshlib.connect(f"dns:127.0.0.1:{at}")
                client = mesh.AsyncClient(timeout=60)
                loading = calling(client, rate=RATE, host=f"http://ledger.test:{port}")
                calls = await loading.__aenter__()
                await calls.more(20)
            try:
                gone = time.monotonic()
                await asyncio.sleep(OUTAGE)
                await calls.more(20)
                with NameServer(at) as server:
                    server.set(f"ledger.test. 1 A {new}")
                    back = time.monotonic()
                    until = back + within(2 * OUTAGE + 15)
                    while not any(each.instance == "ledger-1" for each in calls.since(back)):
                        assert time.monotonic() < until, "the new address is used"
                        await calls.more(1)
                    used = time.monotonic()
                    await calls.more(20)
            finally:
                await loading.__aexit__(None, None, None)
                await client.aclose()
                mesh.close()
            calls.settle(told, servers.executed())
            assert calls.failures("POST") == []
            stale = [each for each in calls.since(gone) if each.began < back]
            assert stale and {each.instance for each in stale} == {"ledger-0"}
            told.counted("calls by what was last known", len(stale))
            # A name server that does not answer is asked again after 1 s, 2 s, ... 30 s.
            told.measured("the new address is used after", used - back, at_most=within(2 * OUTAGE + 15))
