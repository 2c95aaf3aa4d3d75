"""Who is calling? The Peer of a request, as its server's integration tells it; never from a header.

A server that terminates mTLS leaves a model.Peer under `meshlib.peer`: ASGI in `scope["extensions"]` or in
`scope["state"]`, WSGI in the environ. Where there is none, only the addresses are known, and nobody is identified.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from meshlib.identity.tls import Context, secured
from meshlib.model import Peer

PEER, PRINCIPAL, CLAIMS = "meshlib.peer", "meshlib.principal", "meshlib.claims"
"""Keys that the application finds in its scope or environ: the Peer, and who the verified token names."""

present: ContextVar[Peer | None] = ContextVar("meshlib.peer", default=None)
"""Who is at the other end of the connection that a server's task is for; read by WithPeer alone."""


class WithPeer:
    """An ASGI application behind a server that has no place for what it knows of a connection: who is there, from the
    task that serves the connection. What the application calls within the process does not pass here."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(told(scope), receive, send)

    def __repr__(self) -> str:
        return f"<WithPeer {self.app!r}>"


def told(scope: Any) -> Any:
    """`scope` with the peer of its connection, and the scheme that the caller wrote: the mesh's TLS is below."""
    peer = present.get()
    if peer is None or scope["type"] not in ("http", "websocket"):
        return scope
    scheme = "http" if scope["type"] == "http" else "ws"
    return {**scope, "scheme": scheme, "state": {**(scope.get("state") or {}), PEER: peer}}


def of_scope(scope: Mapping[str, Any]) -> Peer:
    for place in ("extensions", "state"):
        found = (scope.get(place) or {}).get(PEER)
        if isinstance(found, Peer):
            return found
    client, server = scope.get("client"), scope.get("server")
    return Peer(
        None,
        scope.get("scheme") in ("https", "wss"),
        str(client[0]) if client else "",
        int(server[1] or 0) if server else 0,
        "",
        str(server[0]) if server else "",
    )


def of_environ(environ: Mapping[str, Any]) -> Peer:
    found = environ.get(PEER)
    if isinstance(found, Peer):
        return found
    connection = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if isinstance(connection, socket.socket) and connection.family != socket.AF_UNIX:
        return _of_socket(connection)
    port = str(environ.get("SERVER_PORT", ""))
    return Peer(
        None,
        environ.get("wsgi.url_scheme") == "https",
        str(environ.get("REMOTE_ADDR", "")),
        int(port) if port.isdecimal() else 0,
    )


def _of_socket(connection: socket.socket) -> Peer:
    """What the connection itself says. Only our own contexts have verified an identity."""
    try:
        address, local = connection.getpeername(), connection.getsockname()
    except OSError:  # it is gone
        return Peer()
    peer = Peer(None, isinstance(connection, ssl.SSLSocket), address[0], local[1], "", local[0])
    if not isinstance(connection, ssl.SSLSocket) or not isinstance(connection.context, Context):
        return peer
    try:
        return secured(peer, connection)
    except ssl.SSLError:
        return peer
