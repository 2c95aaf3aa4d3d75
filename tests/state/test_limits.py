"""Calls that wait for a connection go in order, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import random
import threading

from hypothesis import given
from hypothesis import strategies as st

from meshlib.model import Cluster, ConnectionLimits, LoadAssignment
from meshlib.outbound.drive import wait_for_turn, wait_for_turn_async
from meshlib.policy.cluster import LiveCluster
from meshlib.policy.steps import Queue
from meshlib.state.limits import Ticket


def made(
    connections: int | None, pending: int | None, requests: int | None = None, shadow: bool = False
) -> LiveCluster:
    cluster = Cluster(
        "c",
        limits=ConnectionLimits(connections, pending, requests),
        shadow=frozenset({"limits"} if shadow else ()),
    )
    return LiveCluster(cluster, LoadAssignment("c"), random.Random(1))


def ticket(cluster: LiveCluster) -> Ticket:
    found = cluster.admit(0.0)
    assert isinstance(found, Ticket)
    return found


def test_first_come_first_served() -> None:
    """One connection, three waiting; the fifth is turned away."""
    cluster = made(1, 3)
    assert cluster.admit(0.0) is True
    waiting = [ticket(cluster) for _ in range(3)]
    assert cluster.admit(0.0) is False
    assert cluster.state.overflows == 1
    for number in range(3):
        cluster.leave()
        assert [each.is_granted for each in waiting] == [index <= number for index in range(3)]
    cluster.leave()
    assert cluster.state.requests == 0


def test_nobody_overtakes_the_queue() -> None:
    """A call that comes when a connection has just become free waits behind those that were there."""
    cluster = made(1, 3)
    assert cluster.admit(0.0) is True
    waiting = ticket(cluster)
    cluster.leave()
    assert waiting.is_granted
    assert isinstance(cluster.admit(0.0), Ticket)


def test_requests_bound_running_and_waiting_together() -> None:
    """http2MaxRequests holds for all, whatever the queue may hold."""
    cluster = made(1, 10, requests=2)
    assert cluster.admit(0.0) is True
    assert isinstance(cluster.admit(0.0), Ticket)
    assert cluster.admit(0.0) is False


def test_shadow_mode_turns_nobody_away() -> None:
    """And nobody waits; what would have been is counted."""
    cluster = made(1, 0, shadow=True)
    assert [cluster.admit(0.0) for _ in range(3)] == [True] * 3
    assert cluster.state.overflows == 2
    for _ in range(3):
        cluster.leave()
    assert cluster.state.requests == 0


def test_a_thread_wakes_when_its_turn_comes() -> None:
    """And gives up when its time is over."""
    cluster = made(1, 2)
    assert cluster.admit(0.0) is True
    mine, late = ticket(cluster), ticket(cluster)
    waiting = threading.Thread(target=wait_for_turn, args=(Queue(mine, 10.0),))
    waiting.start()
    cluster.leave()
    waiting.join(10)
    assert not waiting.is_alive()
    wait_for_turn(Queue(late, 0.01))
    assert not late.is_granted


async def test_a_task_wakes_when_a_thread_ends_its_call() -> None:
    """Sync and async calls of one process share the queue."""
    cluster = made(1, 1)
    assert cluster.admit(0.0) is True
    mine = ticket(cluster)
    waiting = asyncio.create_task(wait_for_turn_async(Queue(mine, 10.0)))
    await asyncio.sleep(0)
    await asyncio.to_thread(cluster.leave)
    await waiting
    assert mine.is_granted
    await wait_for_turn_async(Queue(mine, None))


def test_a_turn_for_a_loop_that_has_closed_raises_nowhere() -> None:
    """It would raise in a stranger's call."""
    cluster = made(1, 1)
    assert cluster.admit(0.0) is True
    mine = ticket(cluster)

    async def leave_early() -> None:
        task = asyncio.create_task(wait_for_turn_async(Queue(mine, 10.0)))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave_early())
    cluster.leave()
    assert mine.is_granted


@given(st.lists(st.sampled_from(["call", "end", "give up"])), st.integers(1, 3), st.integers(0, 3))
def test_limits_hold_and_every_turn_comes(events: list[str], connections: int, pending: int) -> None:
    """Never more running or waiting than allowed; nobody waits while a connection is free; all counts end at zero."""
    cluster = made(connections, pending)
    running, waiting = 0, list[Ticket]()

    def settle() -> None:
        nonlocal running
        for each in [each for each in waiting if each.is_granted]:
            waiting.remove(each)
            running += 1
        assert (cluster.state.requests, len(cluster.state.queue)) == (running, len(waiting))
        assert running <= connections
        assert len(waiting) <= pending
        assert not waiting or running == connections

    for event in events:
        if event == "call":
            admitted = cluster.admit(0.0)
            if admitted is True:
                running += 1
            elif admitted is not False:
                waiting.append(admitted)
        elif event == "end" and running:
            running -= 1
            cluster.leave()
        elif event == "give up" and waiting:
            cluster.give_up(waiting.pop(len(waiting) // 2))
        settle()
    while running:
        running -= 1
        cluster.leave()
        settle()
    assert cluster.state.requests == 0
