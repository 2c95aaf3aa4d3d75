"""How does a resource go over the wire? Its bytes, made once for all streams, and the version that they give it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshlib.model import LoadAssignment
from meshlib.xds import messages as m
from meshlib.xds.encode import encode_resource
from meshlib.xds.resource_types import ENDPOINT


@dataclass(frozen=True)
class Resource:
    """A resource as it goes over the wire, the same object for all who get it.

    version: of the content, so it is the same after a restart, and from another control plane.
    """

    type_url: str
    name: str
    version: str
    data: bytes

    # Serialised messages that are joined are the serialised merged message (protobuf, "last one wins" and repeated
    # fields are concatenated). So a response is a head and its resources' own bytes, made once for all streams.

    @cached_property
    def in_sotw_response(self) -> bytes:
        return m.serialize(m.DiscoveryResponse(resources=[self._any]))

    @cached_property
    def in_delta_response(self) -> bytes:
        resource = m.Resource(name=self.name, version=self.version, resource=self._any)
        return m.serialize(m.DeltaDiscoveryResponse(resources=[resource]))

    def timed(self, ttl: float, *, is_sotw: bool, is_heartbeat: bool) -> bytes:
        """The same, good for `ttl` seconds; a heartbeat has no content."""
        resource = m.Resource(name=self.name, version=self.version)
        resource.ttl.FromNanoseconds(round(ttl * 1e9))
        if not is_heartbeat:
            resource.resource.CopyFrom(self._any)
        if is_sotw:
            return m.serialize(m.DiscoveryResponse(resources=[m.pack(resource)]))
        return m.serialize(m.DeltaDiscoveryResponse(resources=[resource]))

    @property
    def _any(self) -> Any:
        return m.Any_(type_url=self.type_url, value=self.data)


def resource_of(type_url: str, name: str, data: bytes) -> Resource:
    return Resource(type_url, name, digest(data), data)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def combined_version(resources: Iterable[Resource]) -> str:
    """Of all of them together, in their order."""
    return digest("".join(f"{each.name} {each.version}\n" for each in resources).encode())


def empty_assignment(cluster: str) -> Resource:
    """For a cluster that is not there: without an answer an Envoy would wait for it for ever."""
    return resource_of(ENDPOINT, cluster, encode_resource(ENDPOINT, LoadAssignment(cluster)))
