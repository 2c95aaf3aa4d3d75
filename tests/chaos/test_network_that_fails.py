"""What does a caller notice of a network that loses, delays, narrows, cuts, or says nothing any more?"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import meshlib
from chaos.fault_proxy import FaultProxy, Faults
from chaos.ledgers import Ledgers, calling, configuration
from chaos.recording import IS_FULL, Promising
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

RATE = 200.0 if IS_FULL else 50.0
CALLS = 4000 if IS_FULL else 80
EJECTION = 1.0


async def test_a_peer_that_is_gone_without_a_word_is_found_out(tmp_path: Path, promise: Promising) -> None:
    """Idle connections to it look as good as any; new ones are made, and lead nowhere."""
    async with promise(
        "Half-open connections (a peer gone without FIN or RST) fail no GET, are ejected, and are not used again when "
        "the peer is back; a POST sent into one fails in its time, and is not sent twice",
        f"the network of one of three endpoints swallows everything while {RATE:g} calls a second go on, then heals",
    ) as told:
        with Ledgers(tmp_path / "servers", 3) as servers, FaultProxy(("127.0.0.1", servers.ports[0])) as proxy:
            ports = [proxy.port, *servers.ports[1:]]
            (tmp_path / "mesh.yaml").write_text(configuration(ports, ejection=EJECTION))
            with meshlib.connect(tmp_path) as mesh:
                async with mesh.AsyncClient(timeout=60) as client, calling(client, rate=RATE) as calls:
                    await calls.more(30)
                    proxy.faults = Faults(swallow=True)
                    gone = time.monotonic()
                    await asyncio.sleep(6.0 if IS_FULL else 1.5)
                    await calls.more(int(RATE / 2))
                    proxy.faults = Faults()
                    healed = time.monotonic()
                    until = healed + within(4 * EJECTION + 10)
                    while not any(each.instance == "ledger-0" for each in calls.since(healed)):
                        assert time.monotonic() < until, "it gets calls again"
                        await calls.more(1)
            assert proxy.swallowed > 0
            calls.settle(told, servers.executed())
            met = [each for each in calls.since(gone) if each.began < healed and each.seconds >= 0.5]
            told.counted("connections that went dead", proxy.swallowed)
            told.measured("share of calls that met them", 100 * len(met) / len(calls.since(gone)), "%")
            back = min(each.began for each in calls.since(healed) if each.instance == "ledger-0")
            told.measured("it gets calls again after", back - healed, at_most=within(4 * EJECTION + 10))
            worst = max((each.seconds for each in calls.failures("POST")), default=0.0)
            told.measured("a POST that fails has failed after", worst, at_most=within(5.0))


@pytest.mark.parametrize(
    ("faults", "name"),
    [
        (Faults(loss=0.02, delay=0.01, jitter=0.02), "2 percent of the segments lost, 10 to 30 ms for each way"),
        *[(Faults(bandwidth=400_000.0, delay=0.005), "400 kB a second for each connection, 5 ms each way")] * IS_FULL,
    ],
    ids=["loss-and-delay", *["bandwidth"] * IS_FULL],
)
async def test_a_poor_network_is_slow_and_nothing_worse(
    tmp_path: Path, promise: Promising, faults: Faults, name: str
) -> None:
    """A try's timeout is for its response; on a line that is merely slow it makes no second request of one that
    would have been answered."""
    async with promise(
        "A network that loses, delays or is narrow fails no call, garbles no body, and repeats no POST",
        f"{name}, before all endpoints, bodies of 4 kB",
    ) as told:
        with (
            Ledgers(tmp_path / "servers", 2) as servers,
            FaultProxy(("127.0.0.1", servers.ports[0]), seed=1, faults=faults) as one,
            FaultProxy(("127.0.0.1", servers.ports[1]), seed=2, faults=faults) as two,
        ):
            (tmp_path / "mesh.yaml").write_text(configuration([one.port, two.port], per_try=20.0))
            with meshlib.connect(tmp_path) as mesh:
                async with mesh.AsyncClient(timeout=60) as client, calling(client, rate=RATE, size=4096) as calls:
                    await calls.more(CALLS, 120.0)
            calls.settle(told, servers.executed())
            assert calls.failures("POST") == []
            told.counted("segments lost", one.lost + two.lost)
            times = sorted(each.seconds for each in calls.made)
            told.measured("median of a call", times[len(times) // 2] * 1000, "ms")
            told.measured("slowest", times[-1])


async def test_a_reset_within_a_response_is_never_taken_for_its_end(tmp_path: Path, promise: Promising) -> None:
    """Before the head a GET is tried again; after it the caller has begun to read, and is told."""
    async with promise(
        "Connections reset within a response: a body that was cut is an error, never a shorter body; what ends before "
        "the head is tried again if it is a GET, and never if it is a POST",
        "a fifth of all stretches of 6 kB ended by RST, bodies of 2 kB, connections used again",
    ) as told:
        faults = Faults(resets=0.2, reset_within=6000)
        with (
            Ledgers(tmp_path / "servers", 2) as servers,
            FaultProxy(("127.0.0.1", servers.ports[0]), seed=3, faults=faults) as one,
            FaultProxy(("127.0.0.1", servers.ports[1]), seed=4, faults=faults) as two,
        ):
            # Nothing is ejected: both are as bad as the other, and which calls meet a reset is the seed's word.
            text = configuration([one.port, two.port], per_try=20.0).replace("errors: 3", "errors: 1000")
            (tmp_path / "mesh.yaml").write_text(text)
            with meshlib.connect(tmp_path) as mesh:
                async with mesh.AsyncClient(timeout=60) as client, calling(client, rate=RATE, size=2048) as calls:
                    await calls.more(CALLS, 120.0)
                    while one.resets + two.resets < 3:
                        await calls.more(10)
            executed = servers.executed()
            assert one.resets + two.resets >= 3
            cut = [each for each in calls.made if each.failure]
            assert [each for each in cut if not each.failure.startswith(("Read", "RemoteProtocol"))] == []
            assert len(cut) <= one.resets + two.resets
            assert [each for each in calls.made if not each.failure and not executed[each.method, each.number]] == []
            assert [number for (method, number), times in executed.items() if method == "POST" and times > 1] == []
            told.counted("calls", len(calls.made))
            told.counted("connections reset", one.resets + two.resets)
            told.counted("of them told to the caller, within the body or of a POST", len(cut))
            told.counted("bodies that were shorter than they should be", 0)
            told.counted("POST that was carried out twice", 0)
