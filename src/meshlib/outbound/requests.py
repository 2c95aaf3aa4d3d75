"""How does a requests call go through the mesh? An HTTPAdapter over the mesh's urllib3 pools.

Sessions keep what is theirs: cookies, redirects, authentication, hooks, environment. `response.raw` is urllib3's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.util import parse_url

from meshlib.errors import MeshError
from meshlib.model import PASSTHROUGH, Forward, Headers, Request
from meshlib.outbound.raising import like
from meshlib.outbound.urllib3 import Edge, Home, MeshPoolManager

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse


class MeshResponse(requests.Response):
    """requests' response. What goes wrong while its body is read is a MeshError, too.

    extensions: `meshlib.flag` and `meshlib.reason`, as on httpx's responses.
    """

    extensions: Mapping[str, str] = {}

    def iter_content(self, chunk_size: int | None = 1, decode_unicode: Any = False) -> Iterator[Any]:
        return _read(super().iter_content(chunk_size, decode_unicode=decode_unicode))


def _read(chunks: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from chunks
    except requests.RequestException as error:
        _blame(error)
        raise


def _blame(error: requests.RequestException) -> None:
    """requests wraps urllib3's exceptions; what they say of the mesh, its own say, too."""
    cause = error.args[0] if error.args else None
    if isinstance(cause, MeshError):
        like(error, cause)


class MeshAdapter(HTTPAdapter):
    """`session.mount("http://", adapter)`: calls to what this prefix names go through the mesh.

    A proxy, be it the session's or the environment's, is not used for hosts of the mesh; hosts that the mesh does not
    know go through it as before. `max_retries` of HTTPAdapter is absent: what is tried again is the route's word.
    Pickled with its session, it finds the Mesh with the same settings in the other process.
    """

    __attrs__: ClassVar[list[str]] = [*HTTPAdapter.__attrs__, "home"]  # type: ignore[misc]

    def __init__(self, home: Home) -> None:
        self.home = home
        super().__init__(pool_connections=1024)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        self._pool_connections, self._pool_maxsize, self._pool_block = connections, maxsize, block
        self.poolmanager = MeshPoolManager(Edge(self.home), connections, **options)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        if proxies and select_proxy(str(request.url), proxies) and self._knows(request):
            proxies = None
        try:
            return super().send(request, stream, timeout, verify, cert, proxies)
        except requests.RequestException as error:
            _blame(error)
            raise

    def build_response(self, req: requests.PreparedRequest, resp: BaseHTTPResponse) -> requests.Response:
        response = super().build_response(req, resp)
        response.__class__ = MeshResponse
        response.extensions = getattr(resp, "extensions", {})  # type: ignore[attr-defined]
        return response

    def _knows(self, request: requests.PreparedRequest) -> bool:
        """Whether the mesh has a word on this host, other than that it may be called."""
        url = parse_url(str(request.url))
        view = Request(str(request.method), url.scheme or "http", url.netloc or "", url.request_uri, Headers())
        live = self.home.call_context(None, False).live
        decision = live().router.match(view)
        if decision is None:
            self.home.resolve(view.authority)
            decision = live().router.match(view) or live().router.unanswered(view)
        action = decision.action
        return not (isinstance(action, Forward) and [each.cluster for each in action.clusters] == [PASSTHROUGH])

    def __repr__(self) -> str:
        return f"<MeshAdapter {self.poolmanager!r}>"


__all__ = ["MeshAdapter", "MeshResponse"]
