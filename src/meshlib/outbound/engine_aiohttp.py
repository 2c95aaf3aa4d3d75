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
from meshlib.outbound.wire import AsyncWireResponse, SendFailed, WireRequest
from meshlib.policy.retry import CLIENT_TIMEOUT, CONNECT_FAILURE, LOCAL, RESET, TIMEOUT

KEEPALIVE = 4.0
"""Seconds an idle connection is kept: less than uvicorn's 5, so that the client is the one who closes."""
_BODILESS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"})


class AiohttpEngine:
    """One aiohttp session for each (event loop, cluster), so that clusters share no connection."""

    def __init__(self) -> None:
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, aiohttp.ClientSession]] = (
            weakref.WeakKeyDictionary()
        )

    def _session(self, request: WireRequest) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        sessions = self._sessions.get(loop)
        if sessions is None:
            sessions = self._sessions.setdefault(loop, {})
        session = sessions.get(request.cluster.name)
        if session is None:
            session = sessions[request.cluster.name] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE, use_dns_cache=False),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                raise_for_status=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                requote_redirect_url=False,
            )
        return session

    async def send(self, request: WireRequest) -> AsyncWireResponse:
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
        raise SettingsError(f"engine 'aiohttp' needs aiohttp 3.11 or newer, found {aiohttp.__version__}")


_check()
