"""How does an attempt reach the wire through aiohttp? Its connector and parser under an httpx client: the same calls,
several times faster under load. Needs aiohttp; async only.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from yarl import URL

from meshlib.errors import SettingsError
from meshlib.model import ConnectionLimits
from meshlib.outbound.connections import KEEPALIVE, is_readable, may_serve, socket_options
from meshlib.outbound.engine_http2 import AsyncHttp2Connections
from meshlib.outbound.http2 import HAS_H2
from meshlib.outbound.wire import AsyncWireResponse, SendFailed, WireRequest
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT

_BODILESS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"})


class _Connector(aiohttp.TCPConnector):
    """aiohttp's connections under a destination's rules."""

    def __init__(self, limits: ConnectionLimits) -> None:
        idle = KEEPALIVE if limits.idle_timeout is None else limits.idle_timeout
        super().__init__(limit=0, keepalive_timeout=idle, use_dns_cache=False)
        self.limits = limits
        self._lives: weakref.WeakKeyDictionary[Any, tuple[float, int]] = weakref.WeakKeyDictionary()
        """By connection: when it was opened, and how many requests it has taken."""

    async def connect(self, *request: Any, **options: Any) -> Any:
        while True:
            connection = await super().connect(*request, **options)
            protocol: Any = connection.protocol
            now = time.monotonic()
            known = self._lives.get(protocol)
            opened, served = known or (now, 0)
            if known is None:
                transport = connection.transport
                set_options(None if transport is None else transport.get_extra_info("socket"), self.limits)
            elif not may_serve(self.limits, served, opened, now) or _is_readable(connection):
                connection.close()  # it has grown too old while it was idle, or the server has closed it
                continue
            self._lives[protocol] = opened, served + 1
            if not may_serve(self.limits, served + 1, opened, now):
                protocol.force_close()  # after this request, which is its last
            return connection


def _is_readable(connection: Any) -> bool:
    transport = connection.transport
    return transport is None or is_readable(transport.get_extra_info("socket"))


def set_options(sock: Any, limits: ConnectionLimits) -> None:
    for option in socket_options(limits) if sock is not None else ():
        sock.setsockopt(*option)


class AiohttpEngine:
    """One aiohttp session for each (event loop, cluster), so that clusters share no connection; another where the rules
    for the cluster's connections have changed. HTTP/2 has connections of its own (outbound/engine_http2). http2: offer
    it to https hosts."""

    speaks_http2 = HAS_H2

    def __init__(self, http2: bool = False) -> None:
        self._http2 = AsyncHttp2Connections(http2)
        self._sessions: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[tuple[str, ConnectionLimits], aiohttp.ClientSession]
        ] = weakref.WeakKeyDictionary()

    def _session(self, request: WireRequest) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        sessions = self._sessions.get(loop)
        if sessions is None:
            sessions = self._sessions.setdefault(loop, {})
        key = request.cluster.name, request.cluster.cluster.limits
        session = sessions.get(key)
        if session is None:
            session = sessions[key] = aiohttp.ClientSession(
                connector=_Connector(key[1]),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                raise_for_status=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                requote_redirect_url=False,
            )
        return session

    async def send(self, request: WireRequest) -> AsyncWireResponse:
        if self._http2.wants(request) and (answer := await self._http2.send(request)) is not None:
            return answer
        started = time.monotonic()
        timeouts = request.timeouts
        endpoint = request.endpoint
        url = URL(
            f"{request.scheme.decode('ascii')}://{endpoint.authority}{request.target.decode('ascii')}", encoded=True
        )
        tls: ssl.SSLContext | bool = True if request.tls is None else request.tls
        # aiohttp frames the body itself; two framings in one request would be an attack.
        framing = (b"content-length", b"transfer-encoding")
        headers = [
            (name.decode("latin-1"), _text(value)) for name, value in request.headers if name.lower() not in framing
        ]
        length = next((value for name, value in request.headers if name.lower() == framing[0]), None)
        if length is not None:
            headers.append(("Content-Length", length.decode("latin-1")))
        has_body = length not in (None, b"0") or any(name.lower() == framing[1] for name, _ in request.headers)
        try:
            async with asyncio.timeout(request.timeout):
                response = await self._session(request).request(
                    request.method.decode("ascii"),
                    url,
                    headers=headers,
                    data=request.content if has_body or request.method not in _BODILESS else None,
                    allow_redirects=False,
                    server_hostname=request.host if request.tls is not None else None,
                    ssl=tls,
                    timeout=aiohttp.ClientTimeout(
                        total=None,
                        connect=None,
                        sock_connect=timeouts.get("connect"),
                        sock_read=timeouts.get("read"),
                    ),
                )
        except Exception as error:
            raise _failed(error, request, started) from error

        async def close() -> None:
            if response.closed or response.content.at_eof():
                response.release()
            else:
                response.close()

        return AsyncWireResponse(
            response.status,
            list(response.raw_headers),
            _Body(response),
            {"http_version": b"HTTP/1.1", "reason_phrase": (response.reason or "").encode("latin-1")},
            close,
        )

    async def aclose(self) -> None:
        await self._http2.aclose()
        for session in self._sessions.pop(asyncio.get_running_loop(), {}).values():
            await session.close()

    def __repr__(self) -> str:
        return f"<AiohttpEngine {sum(map(len, self._sessions.values()))} clusters>"


def _text(value: bytes) -> str:
    """aiohttp writes UTF-8; bytes that are UTF-8 arrive as they were, and others no worse than they must."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


class _Body:
    """The bytes as they come; aiohttp's errors as SendFailed, so that the transport can name httpx's."""

    __slots__ = ("_response",)

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.SocketTimeoutError as error:
            raise SendFailed(CLIENT_TIMEOUT, "ReadTimeout", str(error)) from error
        except aiohttp.ClientPayloadError as error:
            raise SendFailed(RESET, "RemoteProtocolError", str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise SendFailed(RESET, "ReadError", str(error) or type(error).__name__) from error


def _failed(error: Exception, request: WireRequest, started: float) -> SendFailed:
    failure, name = _classified(error)
    late = request.timeout is not None and time.monotonic() - started >= request.timeout - 0.001
    if isinstance(error, TimeoutError) and late:
        failure = TIMEOUT
    return SendFailed(failure, name, str(error) or type(error).__name__)


def _classified(error: Exception) -> tuple[str, str]:
    """The core's name of a failure, and httpx's class for it."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return CONNECT_FAILURE, "ConnectTimeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return CONNECT_FAILURE, "ConnectError"
    if isinstance(error, TimeoutError):
        return CLIENT_TIMEOUT, "ReadTimeout"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return RESET, "RemoteProtocolError"
    if isinstance(error, (aiohttp.ClientOSError, OSError)):
        return RESET, "ReadError"
    if isinstance(error, aiohttp.ClientResponseError):
        return RESET, "RemoteProtocolError"
    return LOCAL, "LocalProtocolError"


def _check() -> None:
    parts: list[Any] = aiohttp.__version__.split(".")
    if (int(parts[0]), int(parts[1])) < (3, 11):
        raise SettingsError(
            f"engine 'aiohttp' needs aiohttp 3.11 or newer, found {aiohttp.__version__}: pip install 'aiohttp>=3.11'"
        )


_check()
