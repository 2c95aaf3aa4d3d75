"""Does an attempt go out over TLS, and under which name? What the cluster says, and what the endpoint can."""

from __future__ import annotations

import ssl
from functools import lru_cache
from typing import NamedTuple

from meshlib.identity.tls import TlsContexts
from meshlib.model import Cluster, Endpoint


class Secured(NamedTuple):
    """sni: the name that is asked for. Connections are kept by context: rules or credentials that have changed make
    another."""

    context: ssl.SSLContext
    sni: str


def secured(contexts: TlsContexts, cluster: Cluster, endpoint: Endpoint, host: str, http2: bool) -> Secured | None:
    """None is plaintext. host: the request's. http2: whether the client's connections can speak it.

    Raises OSError (NoCredentials among it) where TLS is demanded and there can be none.
    """
    tls = cluster.tls
    if tls is None or (tls.auto and not (endpoint.is_meshed and contexts.has_identity)):
        return None
    return Secured(contexts.client(tls, http2 and cluster.http2), tls.sni or host)


@lru_cache(maxsize=1)
def default_context() -> ssl.SSLContext:
    """For https URLs to hosts whose cluster says nothing about TLS."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
