"""What is the mesh told in the measurements? Istio's YAML: two hosts of one service, one called in plaintext and one
by mTLS, each with what a team would configure: a route by header, retries, limits of connections, outlier detection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import meshlib
from benchmarks.identities import CLIENT, SERVER
from benchmarks.processes import ports
from meshlib.mesh import Mesh

PLAIN, SECURED = "plain.example", "secured.example"
PLAIN_URL, SECURED_URL = f"http://{PLAIN}/reviews/0", f"http://{SECURED}/reviews/0"
_HOST = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{host}]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: {protocol}, protocol: {protocol}, targetPort: {port}}}]
  endpoints:
  - {{address: 127.0.0.1, serviceAccount: {account}, labels: {{version: v1}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: {name}, namespace: default}}
spec:
  host: {host}
  trafficPolicy:
    tls: {{mode: {mode}}}
    connectionPool:
      tcp: {{maxConnections: 1024}}
      http: {{http2MaxRequests: 1024, maxRetries: 64, idleTimeout: 3600s}}
    outlierDetection: {{consecutive5xxErrors: 5, interval: 10s, baseEjectionTime: 30s, maxEjectionPercent: 50}}
  subsets: [{{name: v1, labels: {{version: v1}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {name}, namespace: default}}
spec:
  hosts: [{host}]
  http:
  - match: [{{headers: {{end-user: {{exact: jason}}}}}}]
    route: [{{destination: {{host: {host}, subset: v1}}}}]
  - route: [{{destination: {{host: {host}}}}}]
---
"""


def mesh_yaml(plain: int, secured: int, protocol: str = "HTTP") -> str:
    """plain, secured: ports on 127.0.0.1."""
    told = (("plain", PLAIN, plain, "DISABLE"), ("secured", SECURED, secured, "ISTIO_MUTUAL"))
    return "".join(
        _HOST.format(name=name, host=host, port=port, mode=mode, protocol=protocol.lower(), account=SERVER)
        for name, host, port, mode in told
    )


@contextmanager
def mesh_of(folder: Path, text: str, **settings: Any) -> Iterator[Mesh]:
    """A process of the mesh, with metrics (to be scraped; nobody does) and without spans unless `settings` say
    otherwise. folder: where identities.write_identities wrote."""
    configuration = folder / "mesh"
    configuration.mkdir(exist_ok=True)
    (configuration / "mesh.yaml").write_text(text, encoding="utf-8")
    scraped = f"127.0.0.1:{ports(1)[0]}"
    settings = {"identity": f"files:{folder / CLIENT}", "prometheus": scraped, "cache_dir": "-", **settings}
    with meshlib.connect(configuration, **settings) as mesh:
        yield mesh
