"""Services that register themselves with a town's control plane, and can be made slow: chaos_service.py."""

from __future__ import annotations

import sys
from pathlib import Path

from e2e.town import Town
from peers import unused_port

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: echo}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 80}]
---
"""


def start_echo(town: Town, name: str) -> None:
    """An endpoint of the service `echo`. Returns once it is registered."""
    port = town.ports[name] = unused_port()
    town.start(
        name,
        [sys.executable, str(Path(__file__).with_name("chaos_service.py")), str(port)],
        {
            "MESHLIB_CONTROL_PLANE": town.target,
            "MESHLIB_SERVICE": "echo",
            "MESHLIB_LABELS": "app=echo",
            "MESHLIB_WORKLOAD": "echo",
            "MESHLIB_ADDRESS": f"127.0.0.1:{port}",
            "MESHLIB_CACHE_DIR": "-",
            "HOSTNAME": name,
        },
    )
    town.await_registered(name)
