"""How does a port of a fake service refuse connections, and stay its own? It is bound, and nobody listens."""

from __future__ import annotations

import socket

HOST = "127.0.0.1"


def bound(port: int = 0) -> socket.socket:
    """Connections to it are refused until it listens. Raises OSError."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
    except OSError:
        made.close()
        raise
    return made
