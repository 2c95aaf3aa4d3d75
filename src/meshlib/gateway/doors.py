"""Where does a gateway listen? Doors: one listening socket for each bound Listener, opened, updated and closed as the
configuration changes.

A port that can't be had is a problem of that port alone: it is reported and tried again. Whoever is inside when a door
is closed or its filter chain goes may finish (Envoy drains such connections); no request is cut off.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from meshlib.gateway.entrance import Entrance
from meshlib.gateway.limits import Limits
from meshlib.gateway.protocol import GatewayProtocol
from meshlib.gateway.secrets import SecretSource
from meshlib.gateway.tls import ChainContext, Credentials
from meshlib.model import FilterChain, Listener

_log = logging.getLogger("meshlib.gateway")

_ANY = frozenset({"", "0.0.0.0", "::"})
BACKLOG = 2048
RETRY = 1.0
"""Seconds until a port that could not be bound is tried again."""


class Door:
    """One listening socket, and the connections that came in by it."""

    def __init__(
        self,
        listener: Listener,
        host: str,
        port: int,
        config: Config,
        limits: Limits,
        server: str,
        secrets: SecretSource,
    ) -> None:
        self.listener = listener
        self._secrets = secrets
        self._entering: set[Entrance] = set()
        self.limits = limits
        self.server_name = server.encode("ascii")
        self.state = ServerState()
        self.is_closed = False
        self._config = config
        self._credentials: Credentials | None = None
        self._is_accepting = False
        self._arriving: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._socket = _listening(host, port)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    async def serve(self, listener: Listener) -> None:
        """Serve `listener` from now on, on the socket as it is. Connections whose filter chain is gone are drained."""
        self.listener = listener
        if _is_tls(listener):
            self._credentials = self._credentials or Credentials(self._secrets)
            self._credentials.update(listener.filter_chains)
        else:
            self._credentials = None
        if not self._is_accepting:
            self._accept_more()
        for connection in list(self.connections):
            if connection.filter_chain not in listener.filter_chains:
                connection.shutdown()

    def _accept_more(self) -> None:
        if not self.is_closed:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)
            self._is_accepting = True

    def _accept(self) -> None:
        """Everyone who waits. Not left to an asyncio.Server: one that is closed between its `accept` and the protocol
        forgets the socket (selector_events._accept_connection2, CPython 3.11)."""
        loop = asyncio.get_running_loop()
        for _ in range(BACKLOG):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no more file descriptors, or no memory: asyncio's own server waits as long
                _log.error("%r: nobody can be let in for %g s: %s", self, RETRY, error)
                loop.remove_reader(self._socket)
                loop.call_later(RETRY, self._accept_more)
                return
            task = loop.create_task(self._arrive(connection), name="meshlib-gateway-arrival")
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    async def _arrive(self, connection: socket.socket) -> None:
        if self.is_closed:
            connection.close()
            return
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._enter, connection)
        except OSError as error:  # it is gone already
            _log.debug("%r: a client could not be let in: %s", self, error)
            connection.close()
        except Exception:  # a defect, and of this one connection alone: `leave` waits for all who arrive
            _log.exception("%r: a client could not be let in", self)
            connection.close()

    def _enter(self) -> asyncio.Protocol:
        if self._credentials is None:
            return self._inside()
        entrance = Entrance(self._credentials.context, self._inside, self.limits.handshake, left=self._entering.discard)
        self._entering.add(entrance)
        return entrance

    def _inside(self) -> GatewayProtocol:
        self._empty.clear()
        return GatewayProtocol(self._config, self)

    def left(self) -> None:
        if not self.state.connections:
            self._empty.set()

    @property
    def problems(self) -> tuple[str, ...]:
        return () if self._credentials is None else self._credentials.problems

    @property
    def connections(self) -> set[GatewayProtocol]:
        return cast("set[GatewayProtocol]", self.state.connections)

    def filter_chain(self, secured: ssl.SSLObject | None) -> FilterChain | None:
        """The filter chain of a connection: by the certificate it was given, or the only one there is."""
        if secured is not None:
            return cast(ChainContext, secured.context).chain
        chains = self.listener.filter_chains
        return chains[0] if chains and chains[0].tls is None else None

    def close(self) -> None:
        """Let no one in any more, and those who are inside finish what they do."""
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        for entrance in list(self._entering):
            entrance.abort()
        for connection in list(self.connections):
            connection.shutdown()

    async def leave(self, grace: float | None) -> None:
        """Wait until everyone is out; after `grace` seconds show them out. None is for ever."""
        await asyncio.gather(*self._arriving)
        if self.connections:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        if self.connections:
            _log.warning("%r: not finished within %g s, cut off", self, grace)
        tasks = list(self.state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.connections):
            connection.transport.abort()
        while self.connections:  # each says so on the loop's next turn
            self._empty.clear()
            await self._empty.wait()

    def __repr__(self) -> str:
        scheme = "https" if self._credentials is not None else "http"
        return f"<Door {self.listener.name} {scheme}://{_authority(self.address)} {len(self.connections)} connections>"


class Doors:
    """All doors of a gateway.

    bind: where listeners stand that Istio binds to every address. ports: local port by the one a Gateway names.
    secrets: those that a Gateway's credentialName may name.
    """

    def __init__(
        self,
        config: Config,
        limits: Limits,
        server_name: str,
        bind: str,
        ports: Mapping[int, int],
        secrets: SecretSource,
    ) -> None:
        self._secrets = secrets
        self._config, self._limits, self._server_name = config, limits, server_name
        self._bind, self._ports = bind, dict(ports)
        self._open: dict[tuple[str, int], Door] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed: set[Door] = set()
        self._unopened: dict[tuple[str, int], str] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every port that is wanted could be bound."""
        return not self._unopened

    @property
    def addresses(self) -> dict[str, tuple[str, int]]:
        """Where each listener can be reached, by its name."""
        return {door.listener.name: door.address for door in self._open.values()}

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each thing that is configured and can't be served."""
        found = [problem for door in self._open.values() for problem in door.problems]
        return (*self._unopened.values(), *found)

    async def follow(self, listeners: Iterable[Listener]) -> None:
        """Make it so. Never raises for what can't be bound or read."""
        wanted = {(listener.address, listener.port): listener for listener in listeners if listener.is_bound}
        for place in [place for place in self._open if place not in wanted]:
            gone = self._open.pop(place)
            _log.info("%s closes", gone)
            gone.close()
            self._drain(gone)
        self._unopened = {place: why for place, why in self._unopened.items() if place in wanted}
        for place, listener in wanted.items():
            known = self._open.get(place)
            door = self._opened(place, listener) if known is None else known
            if door is None or (door is known and door.listener == listener):
                continue
            try:
                await door.serve(listener)
            except OSError as error:  # no more file descriptors
                self._open.pop(place, None)
                door.close()
                self._drain(door)
                self._report(place, f"{door} can't be served: {error}")
                continue
            self._open[place] = door
            self._unopened.pop(place, None)
            _log.info("%s %s", door, "opens" if known is None else "has a new configuration")

    def _opened(self, place: tuple[str, int], listener: Listener) -> Door | None:
        address, wanted = place
        host = self._bind if address in _ANY else address
        port = self._ports.get(wanted, wanted)
        try:
            door = Door(listener, host, port, self._config, self._limits, self._server_name, self._secrets)
        except (OSError, TypeError, ValueError) as error:  # the last two for what can be no address
            hint = ""
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
                hint = f"; ports below 1024 need a privilege, so have port {wanted} served by another one"
            reason = getattr(error, "strerror", None) or error
            why = f"{listener.name}: {_authority((host, port))} can't be bound: {reason}{hint}"
            self._report(place, why)
            return None
        return door

    def _report(self, place: tuple[str, int], why: str) -> None:
        if self._unopened.get(place) != why:
            _log.warning("%s; trying again every %g s", why, RETRY)
        self._unopened[place] = why

    def _drain(self, door: Door) -> None:
        self._closed.add(door)
        task = asyncio.create_task(door.leave(None), name="meshlib-gateway-drain")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        task.add_done_callback(lambda _: self._closed.discard(door))

    async def close(self) -> None:
        """Close all doors, and see everyone out within `limits.drain` seconds."""
        for task in list(self._closing):
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        doors = [*self._open.values(), *self._closed]
        self._open.clear()
        self._unopened.clear()
        for door in doors:
            door.close()
        await asyncio.gather(*(door.leave(self._limits.drain) for door in doors))

    def __repr__(self) -> str:
        return f"<Doors {list(self._open.values())!r}>"


def _listening(host: str, port: int) -> socket.socket:
    """Named as TCP in so many words: asyncio switches Nagle's algorithm off only for sockets that say so, and a socket
    accepted says what its listener said. With Nagle, a response's head and body are 40 ms apart."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


def _is_tls(listener: Listener) -> bool:
    return any(chain.tls is not None for chain in listener.filter_chains)


def _authority(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
