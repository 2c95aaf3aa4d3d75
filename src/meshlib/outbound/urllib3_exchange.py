"""What is one call in urllib3's terms? The exchange that the driver works with: attempts, their errors, the answer."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from ssl import CertificateError
from ssl import SSLError as BaseSSLError
from typing import TYPE_CHECKING, Any, cast

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import SKIP_HEADER, Timeout
from urllib3.util.request import rewind_body, set_file_position

from meshlib.identity.tls import NoCredentials
from meshlib.model import Endpoint, Headers, Outcome, Request
from meshlib.outbound.connections import KEEPALIVE, socket_options
from meshlib.outbound.drive import drive
from meshlib.outbound.raising import failed
from meshlib.outbound.tls import secured
from meshlib.outbound.urllib3_connections import MeshResponse, Patience, SecureConnection, Told
from meshlib.outbound.wire import RawHeaders, apply, with_host
from meshlib.policy import propagation
from meshlib.policy.call import outbound_call
from meshlib.policy.observer import Call
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT
from meshlib.policy.steps import Deliver, Flow, Reply, Send

if TYPE_CHECKING:
    from meshlib.outbound.urllib3 import MeshPool

_DRAINED = 16 * 1024
_DRAIN_SECONDS = 0.01
"""The answer of a failed try is read to its end, which saves the connection, if it is short and already there."""
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})  # RFC 9110, 9.2.2
_SKIPPED = SKIP_HEADER.encode("ascii")


class Exchange:
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
                body=self._counted(),
                headers=lines,
                chunked=self.chunked,
                preload_content=False,
                decode_content=self._options.get("decode_content", True),
                enforce_content_length=self._options.get("enforce_content_length", True),
            )
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have answered before it had read all; if it has not, reading says so
        return cast(MeshResponse, connection.getresponse())

    def _counted(self) -> Any:
        """The body; of one that comes in pieces, and whose length is not told, the observer hears how much was sent."""
        body, call = self.body, self._call
        if (
            call is None
            or not isinstance(body, Iterator)
            or any(name.lower() == b"content-length" for name, _ in self._headers)
        ):
            return body
        return _counting(body, call)

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

    def another(self) -> Exchange | None:
        if not isinstance(self.body, (bytes, str, type(None))):
            return None
        return Exchange(
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
            body=Told(body),
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
            _changed(response, apply(step.headers, lines_of(response.headers)))
        patience: Patience = connection.patience
        patience.until = step.deadline
        if step.idle_timeout is not None and (patience.pause is None or step.idle_timeout < patience.pause):
            patience.pause = step.idle_timeout
        connection.end = partial(next, flow, None)
        response._patience, response._endpoint, response._call = connection.patience, self._endpoint, self._call
        response.extensions = {"meshlib.flag": step.flag, "meshlib.reason": step.reason}
        # The response's last byte, or its close, gives the connection back to the pool that it names.
        response._pool, response._connection = self.pool, connection
        return response


class _Lines:
    """Header lines in order, in the form that urllib3's connection reads."""

    __slots__ = ("_raw",)

    def __init__(self, raw: RawHeaders) -> None:
        self._raw = raw

    def __iter__(self) -> Iterator[bytes]:
        return (name for name, _ in self._raw)

    def items(self) -> Sequence[tuple[bytes, bytes | str]]:
        return [(name, SKIP_HEADER if value == _SKIPPED else value) for name, value in self._raw]


def lines_of(headers: Any) -> RawHeaders:
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
        return lines_of(self._headers)

    def get(self, name: str, /) -> str | None:
        found: str | None = self._headers.get(name)
        return found


def _counting(body: Iterator[Any], call: Call) -> Iterator[bytes]:
    for chunk in body:
        data = chunk.encode() if isinstance(chunk, str) else chunk  # as urllib3 would
        call.sent(len(data))
        yield data


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
