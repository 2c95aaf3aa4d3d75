"""What is behind an `xdstp://` name? The resource of the plain name in it, under the name that was asked for.

Whose authority it is decides the client, which asks us for it; so all of them are ours. Context parameters belong to
the name: nobody has one with others than were asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from meshlib.controlplane.resource import Resource, resource_of
from meshlib.xds import messages as m
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, PREFIX, ROUTE
from meshlib.xds.xdstp import parse

_MESSAGES = {LISTENER: m.Listener, ROUTE: m.RouteConfiguration, CLUSTER: m.Cluster, ENDPOINT: m.ClusterLoadAssignment}


def located(type_url: str, uri: str, find: Callable[[str], Resource | None]) -> Resource | None:
    """find: by the plain name. None for what is malformed, of another type, or not there."""
    name = parse(uri)
    if name is None or PREFIX + name.type_name != type_url or type_url not in _MESSAGES:
        return None
    found = find(name.plain)
    if found is None:
        return None
    message = _MESSAGES[type_url].FromString(found.data)
    if type_url == ENDPOINT:
        message.cluster_name = uri
    else:
        message.name = uri
    if type_url == CLUSTER and message.HasField("eds_cluster_config") and not message.eds_cluster_config.service_name:
        message.eds_cluster_config.service_name = found.name  # gRFC A47: else its endpoints' name would be this one
    return resource_of(type_url, uri, m.serialize(message))
