"""How does an application make calls by the mesh? One method for each client library, and one for functions.

Each makes the library's own object around an adapter of outbound/, which is loaded when it is first asked for.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from meshlib.errors import SettingsError
from meshlib.identity.tls import TlsContexts
from meshlib.policy.call import CallContext
from meshlib.policy.live import Live

if TYPE_CHECKING:
    import ssl

    import aiohttp
    import grpc
    import grpc.aio
    import httpx
    import requests
    import urllib3

F = TypeVar("F", bound=Callable[..., Any])


class CallsOut(ABC):
    """What a Mesh gives to those who call; to the adapters it is the home that they ask (their Home)."""

    tls: TlsContexts
    """What connections are secured with."""
    _transports: weakref.WeakSet[Any]
    """What is closed with the Mesh."""

    @property
    @abstractmethod
    def live(self) -> Live:
        """What calls read now."""

    @abstractmethod
    def call_context(self, deadline: float | None = None, may_resend: bool = False) -> CallContext:
        """What one outbound call needs (meshlib.policy.call)."""

    @abstractmethod
    def resolve(self, authority: str) -> None:
        """Wait, bounded, until the feed has said whether it knows `authority` (host:port)."""

    @abstractmethod
    async def resolve_async(self, authority: str) -> None:
        """`resolve`, without blocking the loop."""

    def transport(
        self,
        library: ModuleType | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        http2: bool = False,
    ) -> httpx.BaseTransport:
        """A transport for `httpx.Client(transport=...)` whose calls go through the mesh.

        library: the module httpx (default) or httpx2. ssl_context: for https URLs to hosts whose cluster says nothing
        about TLS; default the system's roots. http2: offer HTTP/2 to such hosts; destinations of the mesh get it where
        their configuration says so. Needs the extra http2. The client's own timeouts stay in force, under the route's.

        Calls raise what httpx's users catch (httpx.ConnectError, httpx.TimeoutException, ...), and get the response
        that a sidecar would have given where the mesh decides (503 UH and UO, 504 UT, 404 NR, faults).
        """
        from meshlib.outbound.engine_httpcore import HttpcoreEngine
        from meshlib.outbound.httpx import sync_transport_class

        library, core = _httpx_and_core(library)
        engine = HttpcoreEngine(core, _checked_http2(http2))
        transport: httpx.BaseTransport = sync_transport_class(library)(self, engine, ssl_context)
        self._transports.add(transport)
        return transport

    def async_transport(
        self,
        library: ModuleType | None = None,
        *,
        engine: Literal["httpcore", "aiohttp"] = "httpcore",
        ssl_context: ssl.SSLContext | None = None,
        http2: bool = False,
    ) -> httpx.AsyncBaseTransport:
        """`transport`, for httpx.AsyncClient on asyncio.

        engine: `aiohttp` sends through aiohttp's connections, several times faster under load; needs aiohttp.
        """
        from meshlib.outbound.httpx import async_transport_class

        library, core = _httpx_and_core(library)
        if engine == "aiohttp":
            from meshlib.outbound.engine_aiohttp import AiohttpEngine

            sender: Any = AiohttpEngine(_checked_http2(http2))
        elif engine == "httpcore":
            from meshlib.outbound.engine_httpcore import AsyncHttpcoreEngine

            sender = AsyncHttpcoreEngine(core, _checked_http2(http2))
        else:
            raise SettingsError(f"engine {engine!r}: there are 'httpcore' and 'aiohttp'")
        transport: httpx.AsyncBaseTransport = async_transport_class(library)(self, sender, ssl_context)
        return transport

    def Client(self, **options: Any) -> httpx.Client:
        """`httpx.Client(transport=mesh.transport(), **options)`; of the options, `http2` is the transport's."""
        import httpx

        return httpx.Client(transport=self.transport(http2=options.pop("http2", False)), **options)

    def AsyncClient(self, **options: Any) -> httpx.AsyncClient:
        """`httpx.AsyncClient(transport=mesh.async_transport(), **options)`; of the options, `http2` is the
        transport's."""
        import httpx

        return httpx.AsyncClient(transport=self.async_transport(http2=options.pop("http2", False)), **options)

    def requests_adapter(self) -> requests.adapters.HTTPAdapter:
        """An adapter for `session.mount("http://", ...)` and `session.mount("https://", ...)` of requests. Needs
        requests.

        Calls raise what requests' users catch, and get the response that a sidecar would have given where the mesh
        decides, as `transport` says.
        """
        from meshlib.outbound.requests import MeshAdapter

        adapter: requests.adapters.HTTPAdapter = MeshAdapter(self)
        self._transports.add(adapter)
        return adapter

    def urllib3(self, **options: Any) -> urllib3.PoolManager:
        """A urllib3 PoolManager (`http.request("GET", url)`) whose calls go through the mesh. Needs urllib3 2.

        options: PoolManager's own (headers, timeout, ca_certs, ...). Its `retries` count redirects only: what is tried
        again is the route's word.
        """
        from meshlib.outbound.urllib3 import Edge, MeshPoolManager

        edge = Edge(self)
        self._transports.add(edge)
        return MeshPoolManager(edge, **options)

    def grpc_channel(
        self,
        target: str,
        *,
        options: Iterable[tuple[str, Any]] = (),
        compression: grpc.Compression | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> grpc.Channel:
        """A grpc.Channel to a service of the mesh (`ratings:9080`), for generated stubs as they are.

        Each call is routed, balanced, limited and tried again by itself, over one connection for each endpoint.
        options, compression: as for grpc.insecure_channel. TLS is what the destination says; credentials: for one that
        says nothing about it, as for grpc.secure_channel.

        Calls raise grpc.RpcError; where the mesh has decided, or the network has failed, that is a MeshError as well.
        """
        from meshlib.outbound.function import authority
        from meshlib.outbound.grpc import MeshChannel

        channel = MeshChannel(self, authority(target), options, compression, credentials)
        self._transports.add(channel)
        return channel

    def grpc_aio_channel(
        self,
        target: str,
        *,
        options: Iterable[tuple[str, Any]] = (),
        compression: grpc.Compression | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    ) -> grpc.aio.Channel:
        """`grpc_channel`, for asyncio: a grpc.aio.Channel, used on one event loop and closed there.

        interceptors: as for grpc.aio.insecure_channel; each sees a call once, however often it is tried.
        """
        from meshlib.outbound.function import authority
        from meshlib.outbound.grpc_aio import MeshAioChannel

        return MeshAioChannel(self, authority(target), options, compression, credentials, interceptors)

    def grpc_client_interceptors(self, target: str = "") -> list[Any]:
        """Interceptors for `grpc.intercept_channel(channel, *...)`, where the channel is not ours: it connects by
        itself, so no endpoint is chosen; faults, limits, breaker, timeout, retries and metadata rules of `target` hold.

        target: the service that the channel leads to, `ratings:9080`. Without it only what the request being served
        hands on goes along: trace context and deadline.
        """
        from meshlib.outbound.function import authority
        from meshlib.outbound.grpc_interceptors import MeshInterceptor

        return [MeshInterceptor(self, authority(target) if target else "")]

    def grpc_aio_client_interceptors(self, target: str = "") -> list[Any]:
        """`grpc_client_interceptors`, for `grpc.aio.insecure_channel(..., interceptors=[...])`: one for each arity."""
        from meshlib.outbound.function import authority
        from meshlib.outbound.grpc_interceptors import aio_interceptors

        return aio_interceptors(self, authority(target) if target else "")

    def aiohttp_middleware(self) -> aiohttp.ClientMiddlewareType:
        """A middleware for `aiohttp.ClientSession(middlewares=[...])`, the last one there. Needs aiohttp 3.12.

        The session's connector keeps the connections, apart for each cluster; the session's own timeouts stay in force,
        under the route's. Calls raise what aiohttp's users catch, and get the response that a sidecar would have given
        where the mesh decides, as `transport` says.
        """
        from meshlib.outbound.aiohttp import MeshMiddleware

        return MeshMiddleware(self)

    def outbound(
        self,
        destination: str,
        *,
        fallback: Callable[..., Any] | None = None,
        failures: type[Exception] | tuple[type[Exception], ...] = Exception,
        idempotent: bool = False,
        path: str = "/",
    ) -> Callable[[F], F]:
        """A decorator for a function that makes a call by itself, with whatever library: `@mesh.outbound("ratings")`.

        Faults, rate limits, the breaker, limits, timeout and retries are the route's and the destination's; no endpoint
        is chosen. The function may be sync, async, a generator or an async generator. Its timeout cancels an async one,
        and keeps a sync one from being tried again. Generators are tried again until their first item.

        destination: the service, as in a URL (`ratings:9080`; without a port 80). path: for routes that match on it.
        fallback: called with the same arguments when the call is given up, also for a result whose `status_code` is
          500 or more after the last try.
        failures: exceptions that count as failures; others are answers and pass as they are.
        idempotent: it may be run again after a try that the other side may have seen. Without it only what was refused
          or never connected is tried again.

        Raises the function's own exception, which is a MeshError as well; or, where the mesh decides, CircuitOpen,
        UpstreamTimeout (a TimeoutError, too), Overflow, RateLimited, FaultInjected, NoRoute.
        """
        from meshlib.outbound.function import Destination, authority, outbound

        to = Destination(self, authority(destination), path, fallback, failures, idempotent)
        decorate: Any = outbound(to)
        return decorate  # type: ignore[no-any-return]


def _httpx_and_core(library: ModuleType | None) -> tuple[ModuleType, ModuleType]:
    """The client library and the connections underneath it, which come in pairs."""
    if library is not None and library.__name__ == "httpx2":
        import httpcore2

        return library, httpcore2
    import httpcore
    import httpx

    return library or httpx, httpcore


def _checked_http2(is_wanted: bool) -> bool:
    """Raises SettingsError where it is wanted and can't be spoken."""
    from meshlib.outbound.http2 import HAS_H2

    if is_wanted and not HAS_H2:
        raise SettingsError(
            "http2=True needs the extra http2, which brings the library h2: pip install 'meshlib-proxyless[http2]'"
        )
    return is_wanted
