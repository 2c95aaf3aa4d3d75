"""Who reads a resource, and what does it understand? The dialects of xDS: ours, gRPC's, Envoy's, and anybody's.

One and the same meaning has another form for each. A reader is never sent what it would refuse, and never less
security than was meant: what it can't do is left out where that closes, and stands for "no" where it restricts.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from functools import lru_cache

from meshlib.model import Node
from meshlib.model.values import dataclass


class Dialect(StrEnum):
    """By the user agent, as each client writes its own."""

    MESHLIB = "meshlib"
    GRPC = "grpc"
    ENVOY = "envoy"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Reader:
    """has_certificates: whether it has a certificate of the mesh and the roots, or is given them: gRPC by the provider
    `default` of its bootstrap, Envoy by SDS. keeps_time: of gRPC's, one that ends calls when their route says so.
    discovery_cluster: of an Envoy that has no ADS, the cluster in its bootstrap by which it calls the discovery
    services; "" is ADS. is_delta: it calls their delta variants.
    """

    dialect: Dialect = Dialect.MESHLIB
    has_certificates: bool = False
    keeps_time: bool = False
    discovery_cluster: str = ""
    is_delta: bool = False


OURSELVES = Reader()
DISCOVERY_CLUSTER = "xds"
"""What an Envoy's bootstrap calls the control plane, unless its node says otherwise; so does ours (bootstrap.py)."""
_GRPC_GO = "gRPC Go/"
"""C-core's timeouts of routes end 1 to 2 seconds early (grpc/grpc#40633), so it gets none; others were not measured."""


@lru_cache(1024)
def dialect_of(user_agent: str) -> Dialect:
    """`gRPC C-core/1.85.1`, `gRPC Go/1.85.0`, `gRPC Java/1.60`; `envoy/1.40.0`; `meshlib/0.1.0`."""
    agent = user_agent.lower()
    for dialect in (Dialect.MESHLIB, Dialect.GRPC, Dialect.ENVOY):
        if agent.startswith(dialect):
            return dialect
    return Dialect.OTHER


def reader_of(node: Node, *, is_known: bool = False, has_ads: bool = True, is_delta: bool = False) -> Reader:
    """is_known: the control plane knows for certain who the node is, so it may give it a certificate. has_ads: it asks
    on an aggregated stream. is_delta: by a delta one."""
    dialect = dialect_of(node.user_agent)
    has_certificates = bool(node.certificates) or (is_known and dialect is Dialect.ENVOY)
    found = Reader(dialect, has_certificates, node.user_agent.startswith(_GRPC_GO))
    if has_ads or dialect is not Dialect.ENVOY:
        return found
    return replace(found, discovery_cluster=node.discovery_cluster or DISCOVERY_CLUSTER, is_delta=is_delta)
