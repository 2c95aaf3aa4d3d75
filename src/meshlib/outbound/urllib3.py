"""How does a urllib3 call go through the mesh? A PoolManager whose pools ask the core where to send.

urllib3 keeps its own ways: redirects, bodies, decoding, exceptions. What changes is below: a pool stands for a name,
not for an address (`urllib3_exchange` sends to those), and the connections are kept for each (cluster, endpoint) and
shared by all pools of one manager (`urllib3_idle`). urllib3's `Retry` counts redirects only; what is tried again is the
route's word. requests uses this too.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Protocol, cast

import urllib3
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry, parse_url

from meshlib.errors import MeshError
from meshlib.identity.tls import TlsContexts
from meshlib.outbound.drive import drive
from meshlib.outbound.mirrors import ThreadMirrors
from meshlib.outbound.raising import like
from meshlib.outbound.urllib3_connections import Connection, MeshResponse, SecureConnection
from meshlib.outbound.urllib3_exchange import Exchange, lines_of
from meshlib.outbound.urllib3_idle import IdleConnections
from meshlib.policy.call import CallContext

_log = logging.getLogger("urllib3.connectionpool")
_PORTS = {"http": 80, "https": 443}


class Home(Protocol):
    """What a pool manager needs of its Mesh. Callable from any thread; the first call starts the feeds.

    tls: what connections are secured with. call_context: made for each call. resolve: waits, bounded, until the feed
    has answered for an authority.
    """

    @property
    def tls(self) -> TlsContexts: ...
    def call_context(self, deadline: float | None, may_resend: bool) -> CallContext: ...
    def resolve(self, authority: str) -> None: ...


class Edge:
    """What all pools of one manager share. close: ends the idle connections; later calls open new ones."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.connections = IdleConnections()
        self.mirrors = ThreadMirrors()

    def close(self) -> None:
        self.connections.close()

    def __repr__(self) -> str:
        return f"<Edge {self.connections!r}>"


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
        exchange = Exchange(self, method, url, body, lines_of(headers or {}), chunked, timeout, options)
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
