"""How does a urllib3 call go through the mesh? A PoolManager whose pools ask the core where to send.

urllib3 keeps its own ways: redirects, bodies, decoding, exceptions. What changes is below: a pool stands for a name,
not for an address, and the connections are kept for each (cluster, endpoint) and shared by all pools of one manager.
urllib3's `Retry` counts redirects only; what is tried again is the route's word. requests uses this too.

Every read and write is given the time that is left, so even a server that trickles is cut at the deadline.
"""

from __future__ import annotations

import http.client
import io
import logging
import os
import socket
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from ssl import CertificateError
from ssl import SSLError as BaseSSLError
from typing import TYPE_CHECKING, Any, Protocol, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    InvalidChunkLength,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import SKIP_HEADER, Retry, Timeout, parse_url
from urllib3.util.request import rewind_body, set_file_position

from meshlib.errors import MeshError
from meshlib.identity.tls import NoCredentials, TlsContexts
from meshlib.model import Endpoint, Headers, Outcome, Request
from meshlib.outbound.connections import KEEPALIVE, may_serve, socket_options
from meshlib.outbound.drive import drive
from meshlib.outbound.mirrors import ThreadMirrors
from meshlib.outbound.raising import failed, like
from meshlib.outbound.tls import secured
from meshlib.outbound.wire import RawHeaders, apply, with_host
from meshlib.policy import propagation
from meshlib.policy.call import CallContext, outbound_call
from meshlib.policy.observer import Call
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

if TYPE_CHECKING:
    from meshlib.model import Cluster

_log = logging.getLogger("urllib3.connectionpool")
MAX_IDLE = 128
"""Idle connections kept for one endpoint; one more is closed when it comes back."""
_DRAINED = 16 * 1024
_DRAIN_SECONDS = 0.01
"""The answer of a failed try is read to its end, which saves the connection, if it is short and already there."""
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2
_PORTS = {"http": 80, "https": 443}
_SKIPPED = SKIP_HEADER.encode("ascii")
_BODY_FAILURES = (ReadTimeoutError, ProtocolError, IncompleteRead, InvalidChunkLength, SSLError)

Key = tuple[Any, ...]


class Home(Protocol):
    """What a pool manager needs of its Mesh. Callable from any thread; the first call starts the feeds.

    tls: what connections are secured with. call_context: made for each call. resolve: waits, bounded, until the feed
    has answered for an authority.
    """

    @property
    def tls(self) -> TlsContexts: ...
    def call_context(self, deadline: float | None, may_resend: bool) -> CallContext: ...
    def resolve(self, authority: str) -> None: ...


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


class _Told(io.BytesIO):
    """The body of an answer that the mesh gives. Closed when it has been read, as http.client's are: urllib3's
    `stream(None)` waits for that."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is None or size < 0 or len(data) < size:
            self.close()
        return data


class Connections:
    """Idle connections of one manager, for each (cluster, endpoint, TLS). Pushing to and popping from a list is
    atomic, so no lock is needed."""

    def __init__(self) -> None:
        self._stacks: dict[Key, list[Any]] = {}
        self._owner = os.getpid()
        self._swept = time.monotonic()
        weakref.finalize(self, _close, self._stacks)

    def take(self, key: Key, cluster: Cluster) -> Any | None:
        """The connection used last that may be used again; those found dead on the way are closed."""
        stack = self._stack(key)
        while stack:
            try:
                connection = stack.pop()
            except IndexError:  # another thread was faster
                return None
            if _is_fit(connection, cluster, time.monotonic()) and connection.is_connected:
                return connection
            connection.close()
        return None

    def give(self, connection: Any) -> None:
        """Keep it, if the response on it was read to its end."""
        response, connection.response = connection.response, None
        stack = self._stack(connection.key)
        is_unfit = response is not None and (not response.isclosed() or response.has_more)
        if connection.is_closed or is_unfit or len(stack) >= MAX_IDLE:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        stack.append(connection)
        if self._stacks.get(connection.key) is not stack:  # swept away at this very moment
            connection.close()

    def sweep(self) -> None:
        """Close what has been idle too long and forget who has none, at most once in KEEPALIVE seconds: nothing else
        would look at an endpoint that has left."""
        now = time.monotonic()
        if now - self._swept < KEEPALIVE:
            return
        self._swept = now
        for key, stack in list(self._stacks.items()):
            try:
                while now - stack[0].idle_since > stack[0].keepalive:
                    stack.pop(0).close()
            except IndexError:  # empty, or another thread was faster
                if not stack:
                    self._stacks.pop(key, None)

    def close(self) -> None:
        _close(self._stacks)

    def _stack(self, key: Key) -> list[Any]:
        if os.getpid() != self._owner:
            # A fork: the parent goes on with these connections. Closing our copies says nothing to the server, since
            # Python's TLS sockets close without a word.
            self._owner = os.getpid()
            _close(self._stacks)
        found = self._stacks.get(key)
        return self._stacks.setdefault(key, []) if found is None else found

    def __repr__(self) -> str:
        return f"<Connections {sum(map(len, self._stacks.values()))} idle to {len(self._stacks)} endpoints>"


def _close(stacks: dict[Key, list[Any]]) -> None:
    for stack in list(stacks.values()):
        while stack:
            stack.pop().close()


def _is_fit(connection: Any, cluster: Cluster, now: float) -> bool:
    limits = cluster.limits
    if now - connection.idle_since > connection.keepalive:
        return False
    return may_serve(limits, connection.served, connection.opened, now)


class Edge:
    """What all pools of one manager share. close: ends the idle connections; later calls open new ones."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.connections = Connections()
        self.mirrors = ThreadMirrors()

    def close(self) -> None:
        self.connections.close()

    def __repr__(self) -> str:
        return f"<Edge {self.connections!r}>"


class _Lines:
    """Header lines in order, in the form that urllib3's connection reads."""

    __slots__ = ("_raw",)

    def __init__(self, raw: RawHeaders) -> None:
        self._raw = raw

    def __iter__(self) -> Iterator[bytes]:
        return (name for name, _ in self._raw)

    def items(self) -> Sequence[tuple[bytes, bytes | str]]:
        return [(name, SKIP_HEADER if value == _SKIPPED else value) for name, value in self._raw]


def _lines(headers: Any) -> RawHeaders:
    """Byte for byte: what text there is goes out as Latin-1, as http.client sends it."""
    return [
        (
            name if isinstance(name, bytes) else name.encode("latin-1"),
            value if isinstance(value, bytes) else str(value).encode("latin-1"),
        )
        for name, value in headers.items()
    ]


class _View:
    """A HeaderView over urllib3's headers."""

    __slots__ = ("_headers",)

    def __init__(self, headers: Any) -> None:
        self._headers = headers

    @property
    def raw(self) -> RawHeaders:
        """For whoever measures, at the end of a call; made anew each time."""
        return _lines(self._headers)

    def get(self, name: str, /) -> str | None:
        found: str | None = self._headers.get(name)
        return found


class _Exchange:
    """One call in urllib3's terms (outbound/drive.Exchange)."""

    __slots__ = (
        "_begun",
        "_call",
        "_carried",
        "_connection",
        "_endpoint",
        "_error",
        "_failure",
        "_headers",
        "_is_replayable",
        "_options",
        "_position",
        "_response",
        "_timeout",
        "body",
        "chunked",
        "pool",
        "target",
        "view",
    )

    def __init__(
        self,
        pool: MeshPool,
        method: str,
        target: str,
        body: Any,
        headers: RawHeaders,
        chunked: bool,
        timeout: Timeout,
        options: Mapping[str, Any],
    ) -> None:
        self.pool, self.target, self.body, self.chunked = pool, target, body, chunked
        self._headers, self._timeout, self._options = headers, timeout, options
        self._carried = carried = propagation.current.get()
        own = Headers(headers)
        self.view = Request(
            method,
            pool.scheme,
            pool.authority,
            target,
            own if carried is None else propagation.CarryingHeaders(own, carried),
        )
        self._position = None if body is None or isinstance(body, (bytes, str)) else set_file_position(body, None)
        self._is_replayable = (
            body is None
            or isinstance(body, (bytes, bytearray, memoryview, str, list, tuple))
            or isinstance(self._position, int)
        )
        self._begun = False
        self._call: Call | None = None
        self._connection: Any = None
        self._response: MeshResponse | None = None
        self._endpoint: Endpoint | None = None
        self._error: HTTPError | None = None
        self._failure = ""

    def flow(self) -> Flow:
        deadline = None if self._carried is None else self._carried.remaining_deadline()
        # A request with an Idempotency-Key may reach the server twice: that is what the key is for
        # (draft-ietf-httpapi-idempotency-key-header).
        may_resend = self.view.method not in _IDEMPOTENT and any(
            name.lower() == b"idempotency-key" for name, _ in self._headers
        )
        context = self.pool.edge.home.call_context(deadline, may_resend)
        self._call = call = context.call
        if call is not None and isinstance(self.body, (bytes, str)):  # http.client adds the content-length, later
            call.request_bytes = len(self.body if isinstance(self.body, bytes) else self.body.encode())
        return outbound_call(self.view, context)

    def send(self, step: Send) -> Outcome:
        self.release()
        self.pool.num_requests += 1
        self._endpoint, self._error = step.endpoint, None
        resendable = self._is_replayable and self.view.method in _IDEMPOTENT
        patience = Patience(None, None if step.timeout is None else time.monotonic() + step.timeout)
        while True:
            try:
                connection, reused = self._connected(step, patience)
            except (HTTPError, OSError) as error:
                failure = LOCAL if isinstance(error, NoCredentials) else CONNECT_FAILURE
                return self._failed(_connect_error(error), failure, patience)
            try:
                self._connection, self._response = connection, self._answer(connection, step, patience)
            except (OSError, http.client.HTTPException, HTTPError) as error:
                connection.close()
                late = isinstance(error, (TimeoutError, ReadTimeoutError))
                if reused and resendable and not late:
                    continue  # it was dead, which only sending could show
                return self._failed(self._native(error), CLIENT_TIMEOUT if late else RESET, patience)
            except BaseException:
                connection.close()
                raise
            return Outcome(self._response.status, _View(self._response.headers), "", self._is_replayable)

    def _connected(self, step: Send, patience: Patience) -> tuple[Any, bool]:
        pool, cluster, endpoint = self.pool, step.cluster.cluster, step.endpoint
        security = None if cluster.tls is None else secured(pool.edge.home.tls, cluster, endpoint, pool.host, False)
        key = (step.cluster.name, endpoint.address, endpoint.port, security or pool.security())
        connections = pool.edge.connections
        found = connections.take(key, cluster)
        if found is not None:
            return found, True
        connections.sweep()
        connection: Any
        if security is not None:
            connection = SecureConnection(
                endpoint.address,
                endpoint.port,
                ssl_context=security.context,
                cert_reqs=security.context.verify_mode,
                server_hostname=security.sni,
                # The context checks what is to be checked; urllib3 would look for the SNI name where it does not.
                assert_hostname=None if security.context.check_hostname else False,
            )
        else:
            connection = pool._new_conn()
            connection.host, connection.port = endpoint.address, endpoint.port
            if pool.scheme == "https" and connection.server_hostname is None:
                connection.server_hostname = pool.host
        connection.key, connection.patience = key, patience
        connection.opened = connection.idle_since = time.monotonic()
        connection.keepalive = KEEPALIVE if cluster.limits.idle_timeout is None else cluster.limits.idle_timeout
        connection.socket_options = [*(connection.socket_options or []), *socket_options(cluster.limits)]
        try:
            patience.pause = cluster.connect_timeout
            if (own := Timeout.resolve_default_timeout(self._timeout.connect_timeout)) is not None:
                patience.pause = min(own, cluster.connect_timeout)
            connection.timeout = patience.left()
            if security is None:
                pool._validate_conn(connection)  # warns of https without verification
            if connection.is_closed:
                connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection, False

    def _answer(self, connection: Any, step: Send, patience: Patience) -> MeshResponse:
        if self._begun and self._position is not None:
            rewind_body(self.body, self._position)
        headers = self._headers
        if step.authority is not None:
            headers = with_host(headers, step.authority)
        elif not any(name.lower() == b"host" for name, _ in headers):
            headers = [(b"Host", self.pool.authority.encode("ascii")), *headers]
        if self._carried is not None or step.timeout is not None:
            headers = [*headers, *propagation.outbound_headers(self._carried, Headers(headers), step.timeout)]
        if step.headers:
            headers = apply(step.headers, headers)
        patience.pause = self._timeout.read_timeout
        if patience.pause == 0:
            raise ReadTimeoutError(self.pool, self.target, "Read timed out. (read timeout=0)")
        connection.patience = patience
        connection.timeout = patience.left()
        connection.served += 1
        self._begun = True
        lines: Any = _Lines(headers)
        try:
            connection.request(
                self.view.method,
                self.target if step.path is None else step.path,
                body=self.body,
                headers=lines,
                chunked=self.chunked,
                preload_content=False,
                decode_content=self._options.get("decode_content", True),
                enforce_content_length=self._options.get("enforce_content_length", True),
            )
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have answered before it had read all; if it has not, reading says so
        return cast(MeshResponse, connection.getresponse())

    def _native(self, error: Exception) -> HTTPError:
        """urllib3's exception for what went wrong after the connection was there."""
        if isinstance(error, HTTPError):
            return error
        if isinstance(error, TimeoutError):
            return ReadTimeoutError(self.pool, self.target, f"Read timed out. ({error})").with_traceback(None)
        wrapped = SSLError(error) if isinstance(error, BaseSSLError) else ProtocolError("Connection aborted.", error)
        wrapped.__cause__ = error
        return wrapped

    def _failed(self, error: HTTPError, failure: str, patience: Patience) -> Outcome:
        if patience.is_over and (failure == CLIENT_TIMEOUT or isinstance(error, ConnectTimeoutError)):
            failure = TIMEOUT
        self._error, self._failure = error, failure
        return Outcome(None, None, failure, self._is_replayable or not self._begun)

    def release(self) -> None:
        response, self._response = self._response, None
        if response is None:
            return
        connection, self._connection = self._connection, None
        length = response.length_remaining
        if length is not None and length <= _DRAINED:
            connection.patience.until = time.monotonic() + _DRAIN_SECONDS
            response.drain_conn()
        self.pool.edge.connections.give(connection)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def resolve(self, authority: str) -> None:
        self.pool.edge.home.resolve(authority)

    def another(self) -> _Exchange | None:
        if not isinstance(self.body, (bytes, str, type(None))):
            return None
        return _Exchange(
            self.pool,
            self.view.method,
            self.target,
            self.body,
            self._headers,
            self.chunked,
            self._timeout,
            self._options,
        )

    def mirror(self, flow: Flow) -> bool:
        copy = self.another()
        if copy is None:  # a body that can be sent once, or a file being read, goes to the server that matters
            return False

        def run() -> None:
            response = drive(flow, copy)
            response.drain_conn()
            response.close()

        return self.pool.edge.mirrors.start(f"{self.view.method} {self.view.authority}{self.target}", run)

    def reply(self, step: Reply) -> MeshResponse:
        body = b"" if self.view.method == "HEAD" else step.body
        headers = urllib3.HTTPHeaderDict(step.headers)
        headers["content-length"] = str(len(step.body))
        made = MeshResponse(
            body=_Told(body),
            headers=headers,
            status=step.status,
            version=11,
            reason=_phrase(step.status),
            preload_content=False,
            decode_content=self._options.get("decode_content", True),
            request_method=self.view.method,
            request_url=self.target,
        )
        made.version_string = "HTTP/1.1"
        made.extensions = {"meshlib.flag": step.flag, "meshlib.reason": step.reason}
        return made

    def deliver(self, step: Deliver, flow: Flow) -> MeshResponse:
        response, self._response = self._response, None
        if response is None:
            flow.close()
            assert self._error is not None
            error = self._error
            raise failed(error, self._failure, step.flag, step.reason, self._endpoint) from error.__cause__
        connection: Any = self._connection
        if step.headers:
            _changed(response, apply(step.headers, _lines(response.headers)))
        patience: Patience = connection.patience
        patience.until = step.deadline
        if step.idle_timeout is not None and (patience.pause is None or step.idle_timeout < patience.pause):
            patience.pause = step.idle_timeout
        connection.end = flow.close
        response._patience, response._endpoint, response._call = connection.patience, self._endpoint, self._call
        response.extensions = {"meshlib.flag": step.flag, "meshlib.reason": step.reason}
        # The response's last byte, or its close, gives the connection back to the pool that it names.
        response._pool, response._connection = self.pool, connection
        return response


def _connect_error(error: Exception) -> HTTPError:
    """urllib3's exception for a connection that was not made."""
    if isinstance(error, HTTPError):
        return error
    wrapped: HTTPError
    if isinstance(error, TimeoutError):
        wrapped = ConnectTimeoutError(None, f"Connection timed out: {error}")
    elif isinstance(error, (BaseSSLError, CertificateError)):
        wrapped = SSLError(error)
    else:
        nothing: Any = None
        wrapped = NewConnectionError(nothing, f"Failed to establish a new connection: {error}")
    wrapped.__cause__ = error
    return wrapped


def _changed(response: Any, lines: RawHeaders) -> None:
    """The response with other headers; also where http.cookiejar looks for them."""
    headers, message = urllib3.HTTPHeaderDict(), http.client.HTTPMessage()
    for name, value in lines:
        headers.add(name.decode("latin-1"), value.decode("latin-1"))
        message[name.decode("latin-1")] = value.decode("latin-1")
    response.headers = headers
    response._original_response.headers = response._original_response.msg = message


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


class _Nothing:
    """Stands where urllib3's `urlopen` holds a connection; the real ones come with the attempts."""

    timeout: Any = None
    proxy = None
    is_closed = False
    has_connected_to_proxy = False

    def close(self) -> None: ...


_NOTHING: Any = _Nothing()


class MeshPool(HTTPConnectionPool):
    """urllib3's pool for one name, whose requests go where the mesh says."""

    ConnectionCls: Any = Connection
    edge: Edge
    _authority: str | None = None

    @property
    def authority(self) -> str:
        """The name as it stands in a URL: `reviews:9080`."""
        if self._authority is None:
            host = f"[{self.host}]" if ":" in self.host else self.host
            is_default = self.port is None or self.port == _PORTS.get(self.scheme or "http")
            self._authority = host if is_default else f"{host}:{self.port}"
        return self._authority

    def security(self) -> tuple[Any, ...] | None:
        """What two pools must agree on to share a connection."""
        return None

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, body: Any = None, headers: Any = None, retries: Any = None, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        """As urllib3's. `retries`: its redirects count, its tries do not, since those are the route's."""
        if not isinstance(retries, Retry):
            retries = Retry.from_int(retries, redirect=options.get("redirect", True), default=self.retries)
        try:
            return super().urlopen(method, url, body, headers, _redirects_only(retries), **options)
        except MaxRetryError as error:
            if isinstance(error.reason, MeshError):
                like(error, error.reason)
            raise

    def _get_conn(self, timeout: float | None = None) -> Any:
        return _NOTHING

    def _put_conn(self, conn: Any) -> None:
        if conn is not None and conn is not _NOTHING:
            self.edge.connections.give(conn)
            conn.finished()

    def _make_request(  # type: ignore[override]
        self,
        conn: Any,
        method: str,
        url: str,
        body: Any = None,
        headers: Any = None,
        retries: Retry | None = None,
        timeout: Any = None,
        chunked: bool = False,
        response_conn: Any = None,
        preload_content: bool = True,
        **options: Any,
    ) -> MeshResponse:
        if not url.startswith("/"):
            url = parse_url(url).request_uri
        timeout.start_connect()
        exchange = _Exchange(self, method, url, body, _lines(headers or {}), chunked, timeout, options)
        response = drive(exchange.flow(), exchange)
        response.retries = retries
        _log.debug(  # as urllib3 says it
            '%s://%s:%s "%s %s %s" %s %s',
            self.scheme,
            self.host,
            self.port,
            method,
            url,
            getattr(response, "version_string", "HTTP/1.1"),  # urllib3 2.3 and newer
            response.status,
            response.length_remaining,
        )
        if preload_content:
            response.read(decode_content=options.get("decode_content", True), cache_content=True)
        return response


class SecureMeshPool(MeshPool, HTTPSConnectionPool):
    """MeshPool, for https URLs. Its TLS settings hold where the cluster says nothing about TLS."""

    ConnectionCls = SecureConnection

    def security(self) -> tuple[Any, ...] | None:
        return (
            self.host,
            self.cert_file,
            self.key_file,
            self.key_password,
            self.cert_reqs,
            self.ca_certs,
            self.ca_cert_dir,
            self.assert_hostname,
            self.assert_fingerprint,
            self.ssl_version,
            self.ssl_minimum_version,
            self.ssl_maximum_version,
            self.conn_kw.get("ssl_context"),
            self.conn_kw.get("server_hostname"),
            self.conn_kw.get("ca_cert_data"),
        )


@lru_cache(maxsize=64)  # most calls share one Retry; making one costs as much as a route's match
def _redirects_only(retries: Retry) -> Retry:
    if retries.total is False:
        return retries  # and errors come as they are, without a MaxRetryError around them
    return retries.new(
        connect=retries.connect if retries.connect is False else 0,
        read=retries.read if retries.read is False else 0,
        status=0,
        other=0,
        status_forcelist=(),
        respect_retry_after_header=False,
    )


class MeshPoolManager(urllib3.PoolManager):
    """urllib3's PoolManager, whose calls go through the mesh. Thread-safe. `clear` closes the idle connections."""

    def __init__(self, edge: Edge, num_pools: int = 1024, headers: Any = None, **options: Any) -> None:
        super().__init__(num_pools, headers, **options)
        self.edge = edge
        self.pool_classes_by_scheme = {"http": MeshPool, "https": SecureMeshPool}

    def _new_pool(self, scheme: str, host: str, port: int, request_context: Any = None) -> MeshPool:
        pool = cast(MeshPool, super()._new_pool(scheme, host, port, request_context))
        pool.edge = self.edge
        return pool

    def clear(self) -> None:
        super().clear()
        self.edge.close()

    def __repr__(self) -> str:
        return f"<MeshPoolManager {self.edge!r}>"


__all__ = ["Edge", "Home", "MeshPoolManager", "MeshResponse"]
