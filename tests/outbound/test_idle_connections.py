"""Idle connections are bounded in time, whether their endpoint is ever called again or not."""

from __future__ import annotations

import time

import httpcore
import pytest

from meshlib.outbound import engine_httpcore, idle
from meshlib.outbound.engine_httpcore import HttpcoreEngine
from peers import Peer
from snapshots import mesh, publish, service


def test_connections_to_an_endpoint_that_left_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for when a new connection is opened anyway."""
    for module in (engine_httpcore, idle):
        monkeypatch.setattr(module, "KEEPALIVE", 0.1)
    with Peer() as gone, Peer() as there, mesh() as made, made.Client() as client:
        publish(made, service("reviews:9080", [gone.address]))
        client.get("http://reviews:9080/")
        publish(made, service("reviews:9080", [there.address]))
        deadline = time.monotonic() + 5
        while gone.open_connections and time.monotonic() < deadline:
            client.get("http://reviews:9080/", headers={"connection": "close"})
        assert gone.open_connections == 0


def test_closing_the_engine_closes_what_is_idle() -> None:
    """And leaves nothing for the garbage collector to complain about."""
    with Peer() as peer, mesh(service("reviews:9080", [peer.address])) as made:
        transport = made.transport()
        import httpx

        client = httpx.Client(transport=transport)
        client.get("http://reviews:9080/")
        assert peer.open_connections == 1
        client.close()
        deadline = time.monotonic() + 5
        while peer.open_connections and time.monotonic() < deadline:
            time.sleep(0.005)
        assert peer.open_connections == 0


def test_an_engine_says_what_it_holds() -> None:
    """For people in a debugger."""
    assert repr(HttpcoreEngine(httpcore)) == "<HttpcoreEngine <Idle 0 connections to 0 endpoints>>"
