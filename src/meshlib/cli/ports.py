"""Which ports may the demo use? The usual ones where they are free, else the next free ones."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection


class NoFreePort(Exception):
    """No port near the wanted one is free."""


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now. (Somebody may take it before it does; then that server says so.)

    A listener on all addresses counts too, though the kernel would let us listen beside it: it would lose its requests.
    """
    for address in (host, ""):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what servers do: TIME_WAIT is no listener
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    return False
                raise
    return True


def free_port(wanted: int, taken: Collection[int] = (), host: str = "127.0.0.1", tries: int = 200) -> int:
    """`wanted`, or the first free port above it that is not in `taken`. 0 takes any that the system gives.

    Not just any: near the usual one is easier to recognise, and stays below the range from which the system takes the
    ports of outgoing connections.
    """
    if wanted == 0:
        with socket.create_server((host, 0)) as server:
            port: int = server.getsockname()[1]
        return port if port not in taken else free_port(0, taken, host)
    for port in range(wanted, min(wanted + tries, 65536)):
        if port not in taken and is_free(port, host):
            return port
    raise NoFreePort(f"no free port between {wanted} and {wanted + tries - 1}: give another with --port, or 0 for any")
