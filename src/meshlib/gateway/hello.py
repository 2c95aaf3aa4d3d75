"""Whom does a TLS client want to speak to? The server name of its ClientHello (RFC 8446, 4.1.2; RFC 6066, 3).

It is read before the handshake begins: whether to ask for a client's certificate is settled before OpenSSL tells it.
"""

from __future__ import annotations

LONGEST = 64 * 1024
"""Bytes of a ClientHello that are read; those with post-quantum keys have two thousand."""
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0


class NoHello(ValueError):
    """What came is no ClientHello."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise NoHello("it ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> _Reader:
        """What a length of `size` bytes in front of it bounds."""
        return _Reader(self.take(self.number(size)))

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._data)


def server_name(data: bytes) -> str | None:
    """The name, "" when the client gives none; None when `data`, the first bytes of a connection, does not hold it all.

    Raises NoHello.
    """
    hello = _message(data)
    if hello is None:
        return None
    hello.take(2 + 32)  # version, random
    hello.block(1), hello.block(2), hello.block(1)  # session, cipher suites, compression
    if hello.is_empty:
        return ""
    extensions = hello.block(2)
    while not extensions.is_empty:
        kind, extension = extensions.number(2), extensions.block(2)
        if kind != _SERVER_NAME:
            continue
        names = extension.block(2)
        while not names.is_empty:
            name_type, name = names.number(1), names.block(2)
            if name_type == _HOST_NAME:
                return name.take(len(name._data)).decode("ascii", "replace").lower()
    return ""


def _message(data: bytes) -> _Reader | None:
    """The body of the first handshake message, which may be cut into several records; None when it is not all there."""
    message = b""
    at = 0
    while True:
        if at < len(data) and data[at] != _HANDSHAKE:
            raise NoHello("it is no TLS")
        if len(message) >= 4:
            if message[0] != _CLIENT_HELLO:
                raise NoHello("it is no ClientHello")
            size = int.from_bytes(message[1:4], "big")
            if size > LONGEST:
                raise NoHello(f"it has {size} bytes")
            if len(message) >= 4 + size:
                return _Reader(message[4 : 4 + size])
        if len(data) < at + 5:
            return None
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if not 0 < length <= 16384 + 256:
            raise NoHello(f"a record has {length} bytes")
        message += data[at + 5 : at + 5 + length]
        if len(data) < at + 5 + length:
            return None
        at += 5 + length
