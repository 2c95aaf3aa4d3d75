"""Which clusters do an Envoy's filters call? Those of the mesh where it knows the host, else some of their own."""

from __future__ import annotations

from dataclasses import replace

from meshlib.model import Access, Cluster, ClusterType, Endpoint, LoadAssignment, Snapshot, UpstreamTls
from meshlib.xds.http_filters import http_filters
from meshlib.xds.reader import Dialect, Reader


class Upstreams:
    """The clusters of a snapshot by the host and port that one writes; others are made when they are asked for."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._clusters = {each.name: each for each in snapshot.clusters}
        self._assignments = {each.cluster: each for each in snapshot.assignments}
        self._names = {each.name: each.route_configuration for each in snapshot.listeners if not each.is_bound}
        self.clusters: dict[str, Cluster] = {}
        """What was made."""
        self.assignments: dict[str, LoadAssignment] = {}

    def cluster(self, host: str, port: int, *, tls: bool = False, http2: bool = False) -> str:
        """A cluster's name. tls: server TLS for what is not of the mesh; http2: what gRPC needs."""
        known = self._clusters.get(f"outbound|{port}||{host}") or self._clusters.get(
            self._names.get(f"{host}:{port}", "")
        )
        if known is not None and (known.http2 or not http2):
            return known.name
        name = f"{'grpc' if http2 else 'https' if tls else 'http'}|{port}||{host}"
        if known is not None:
            self.clusters[name] = replace(known, name=name, http2=True)
            if known.type is ClusterType.EDS:
                self.assignments[name] = replace(self._assignments[known.name], cluster=name)
        else:
            self.clusters[name] = Cluster(
                name,
                ClusterType.STRICT_DNS,
                endpoints=(Endpoint(host, port),),
                tls=UpstreamTls("SIMPLE", sni=host) if tls else None,
                http2=http2,
            )
        return name

    def add_of(self, access: Access) -> None:
        """Those that an Envoy's filters for these rules will call."""
        http_filters(access, Reader(Dialect.ENVOY), self)
