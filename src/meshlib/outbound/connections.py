"""How long does a connection live, and with which socket options? ConnectionLimits, for every engine."""

from __future__ import annotations

import select
import socket
from typing import Any

from meshlib.model import ConnectionLimits

KEEPALIVE = 4.0
"""Seconds an idle connection is kept unless the destination says otherwise: less than uvicorn's 5, so that the client
is the one who closes."""


def may_serve(limits: ConnectionLimits, served: int, opened: float, now: float) -> bool:
    """Whether a connection that has served so many requests since `opened` may take another."""
    if limits.max_requests_per_connection and served >= limits.max_requests_per_connection:
        return False
    return limits.max_connection_duration is None or now - opened < limits.max_connection_duration


def is_readable(sock: Any) -> bool:
    """Whether something waits on an idle connection: its end, or what nobody asked for. Either way it is not used."""
    if sock is None or sock.fileno() < 0:
        return True
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock.fileno()], [], [], 0)[0])


def socket_options(limits: ConnectionLimits) -> list[tuple[int, int, int]]:
    """For setsockopt. Options that this operating system has no name for are left out."""
    keepalive = limits.tcp_keepalive
    if keepalive is None:
        return []
    found = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (
        ("TCP_KEEPCNT", keepalive.probes),
        ("TCP_KEEPIDLE", keepalive.time),
        ("TCP_KEEPINTVL", keepalive.interval),
    ):
        if value and hasattr(socket, name):
            found.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return found
