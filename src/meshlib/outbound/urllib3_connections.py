"""What do a connection and a response of urllib3's do under the mesh's deadlines?

Every read and write is given the time that is left, so even a server that trickles is cut at the deadline. What
http.client would take for a whole response is looked at twice.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    InvalidChunkLength,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from meshlib.model import Endpoint
from meshlib.outbound.connections import KEEPALIVE
from meshlib.outbound.raising import failed
from meshlib.policy.observer import Call
from meshlib.policy.retry import CLIENT_TIMEOUT, RESET, TIMEOUT

_BODY_FAILURES = (ReadTimeoutError, ProtocolError, IncompleteRead, InvalidChunkLength, SSLError)

Key = tuple[Any, ...]
"""In which stack a connection is kept: (cluster, address, port, TLS)."""


class Patience:
    """How long one attempt may wait for each of its reads and writes.

    until: monotonic seconds at which the mesh gives up; pause: seconds that the application allows for one read.
    """

    __slots__ = ("pause", "until")

    def __init__(self, pause: float | None = None, until: float | None = None) -> None:
        self.pause, self.until = pause, until

    def left(self) -> float | None:
        """Seconds for the next read or write. Raises TimeoutError when there are none."""
        if self.until is None:
            return self.pause
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left if self.pause is None or left < self.pause else self.pause

    @property
    def is_over(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until - 0.001


class _Reads(io.RawIOBase):
    """A socket's bytes, each read within the attempt's patience."""

    is_at_end = False
    is_spent = False
    """Nothing more is wanted: what is read now is what was read ahead."""

    def __init__(self, raw: Any, sock: socket.socket, patience: Patience) -> None:
        self._raw, self._sock, self._patience = raw, sock, patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.is_spent:
            return 0
        self._sock.settimeout(self._patience.left())
        count: int | None = self._raw.readinto(buffer)
        if count == 0:
            self.is_at_end = True
        return count

    def fileno(self) -> int:
        return cast(int, self._raw.fileno())

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
            super().close()


class _HttplibResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, patience: Patience, **options: Any) -> None:
        super().__init__(sock, **options)
        plain: Any = self.fp
        self._reads = _Reads(plain.detach(), sock, patience)
        self.fp = io.BufferedReader(self._reads)

    has_more = False
    """Whether the server has sent more than this response, which is nobody's."""

    def begin(self) -> None:
        super().begin()
        if self._reads.is_at_end:
            # http.client takes the end of the connection for the end of the head, and half a response for a whole one.
            raise http.client.RemoteDisconnected("Remote end closed connection within the response's head")
        lengths = {each.strip() for value in self.msg.get_all("content-length", ()) for each in value.split(",")}
        if not self.chunked and (len(lengths) > 1 or not all(each.isascii() and each.isdigit() for each in lengths)):
            # http.client reads on until the end then, and takes whatever came for whole (RFC 9112, 6.3: an error).
            raise http.client.HTTPException(f"the response's length is {', '.join(sorted(lengths))!r}")

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 < status < 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            http.client.parse_headers(self.fp)  # 103 and the like: http.client knows 100 alone

    def _close_conn(self) -> None:
        if self.fp is not None:
            self._reads.is_spent = True
            self.has_more = bool(self.fp.peek(1))
        super()._close_conn()  # type: ignore[misc]


class _Kept:
    """What the mesh adds to urllib3's connections. The end of a connection's work ends the call that it was for.

    key: in which stack it is kept. response: the one being read. end: called when the delivered response is done with,
    once.
    """

    key: Key = ()
    opened = 0.0
    idle_since = 0.0
    keepalive = KEEPALIVE
    served = 0
    patience = Patience()
    response: http.client.HTTPResponse | None = None
    end: Any = None
    sock: Any

    def response_class(self, sock: socket.socket, **options: Any) -> _HttplibResponse:
        return _HttplibResponse(sock, self.patience, **options)

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(self.patience.left())
        super().send(data)  # type: ignore[misc]

    def getresponse(self) -> MeshResponse:
        response: Any = super().getresponse()  # type: ignore[misc]
        response.__class__ = MeshResponse
        self.response = response._original_response
        return cast(MeshResponse, response)

    def close(self) -> None:
        try:
            super().close()  # type: ignore[misc]
        finally:
            self.finished()

    def finished(self) -> None:
        end, self.end = self.end, None
        if end is not None:
            end()


class Connection(_Kept, HTTPConnection):  # type: ignore[misc]
    """urllib3's connection, to an endpoint."""


class SecureConnection(_Kept, HTTPSConnection):  # type: ignore[misc]
    """urllib3's TLS connection, to an endpoint; SNI and the name that is checked are the service's."""


class MeshResponse(urllib3.HTTPResponse):
    """urllib3's response. What goes wrong while its body is read is a MeshError, too.

    extensions: `meshlib.flag` and `meshlib.reason`, as on httpx's responses.
    """

    extensions: Mapping[str, str] = {}
    _patience = Patience()
    _endpoint: Endpoint | None = None
    _call: Call | None = None

    def read(self, amt: int | None = None, decode_content: bool | None = None, cache_content: bool = False) -> bytes:
        try:
            return super().read(amt, decode_content, cache_content)
        except _BODY_FAILURES as error:
            self._blame(error)
            raise

    def read1(self, amt: int | None = None, decode_content: bool | None = None) -> bytes:
        try:
            return super().read1(amt, decode_content)
        except _BODY_FAILURES as error:
            self._blame(error)
            raise

    def read_chunked(self, amt: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:  # type: ignore[override]
        try:
            yield from super().read_chunked(amt, decode_content)
        except _BODY_FAILURES as error:
            self._blame(error)
            raise

    # Where urllib3 takes bytes from http.client. Once it has the last, the call has ended, and nothing is counted.

    def _fp_read(self, *args: Any, **options: Any) -> bytes:
        return self._counted(super()._fp_read(*args, **options))

    def _handle_chunk(self, amt: int | None) -> bytes:
        return self._counted(super()._handle_chunk(amt))

    def _counted(self, data: bytes) -> bytes:
        """A part of the body as it was on the wire."""
        if self._call is not None and data:
            self._call.received(len(data))
        return data

    def _blame(self, error: HTTPError) -> None:
        told, flag, failure = "while the response's body was read", "UC", RESET
        if isinstance(error, ReadTimeoutError):
            flag, failure = "DC", CLIENT_TIMEOUT
            if self._patience.is_over:
                told, flag, failure = f"the route's timeout passed {told}", "UT", TIMEOUT
        failed(error, failure, flag, told, self._endpoint)


class Told(io.BytesIO):
    """The body of an answer that the mesh gives. Closed when it has been read, as http.client's are: urllib3's
    `stream(None)` waits for that."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is None or size < 0 or len(data) < size:
            self.close()
        return data
