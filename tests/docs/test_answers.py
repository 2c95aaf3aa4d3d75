"""Are the answers that docs/reference/answers.md lists the ones that a caller gets?

Each row is provoked in a mesh from a folder, by a real call through httpx, and compared cell by cell.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator

import httpx
import pytest
from pages import ROOT

import meshlib
from peers import Answer, Peer, refusing_port

PAGE = (ROOT / "docs" / "reference" / "answers.md").read_text()
CONFIGURATION = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: here}}
spec:
  hosts: [reviews, limited, routed]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: refuses}}
spec:
  hosts: [refuses]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{http: {closed}}}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: empty}}
spec:
  hosts: [empty]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: routed}}
spec:
  hosts: [routed]
  http:
  - match: [{{uri: {{exact: /nc}}}}]
    route: [{{destination: {{host: routed, subset: v9}}}}]
  - match: [{{uri: {{exact: /ut}}}}]
    timeout: 100ms
    route: [{{destination: {{host: routed}}}}]
  - match: [{{uri: {{exact: /fi}}}}]
    fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}
    route: [{{destination: {{host: routed}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: limited}}
spec:
  host: limited
  trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: 1}}, http: {{http2MaxRequests: 1}}}}}}
"""
REGISTRY_ONLY = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"}
"""
UNANSWERED = "no configuration"
OVERFLOW = "upstream connect error or disconnect/reset before headers. reset reason: overflow"
# Which call is answered so.
CALLS = {
    ("404", "NR", "none"): "http://routed/elsewhere",
    ("502", "", "none"): "http://unknown.example/",
    ("503", "NC", "none"): "http://routed/nc",
    ("503", "NC", UNANSWERED): "http://reviews/",
    ("503", "UH", "no healthy upstream"): "http://empty/",
    ("503", "UO", OVERFLOW): "http://limited/",
    ("504", "UT", "upstream request timeout"): "http://routed/ut",
    ("as set", "FI", "fault filter abort"): "http://routed/fi",
}
ROWS = [
    tuple(cell.strip().strip("`") for cell in line.strip("|").split("|"))
    for line in PAGE.splitlines()
    if re.match(r"\| (\d{3}|as set) ", line)
]


class Mesh:
    """lost: of a process whose control plane is not there."""

    def __init__(self, client: httpx.Client, lost: httpx.Client, peer: Peer) -> None:
        self.client, self.lost, self.peer = client, lost, peer
        self.asked, self.release = threading.Event(), asyncio.Event()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("answers")
    with Peer() as peer:
        text = CONFIGURATION.format(port=peer.port, closed=refusing_port())
        (folder / "mesh.yaml").write_text(f"{text}---{REGISTRY_ONLY}")
        nowhere, held_back = (
            f"127.0.0.1:{refusing_port()}",
            {"resolve_timeout": 0.05, "outbound_failure_policy": "deny"},
        )
        with (
            meshlib.connect(str(folder), cache_dir="-") as connected,
            meshlib.connect(nowhere, cache_dir="-", telemetry="off", **held_back) as unconnected,
            connected.Client(trust_env=False) as client,
            unconnected.Client(trust_env=False) as lost,
        ):
            found = Mesh(client, lost, peer)

            def answer(_: object) -> Answer:
                found.asked.set()
                return Answer(gate=found.release.wait())

            peer.answer = answer
            yield found
            peer.loop.call_soon_threadsafe(found.release.set)


def test_every_row_has_a_call() -> None:
    """A new row needs a call that shows it."""
    assert [(status, flag, body) for status, flag, body, _ in ROWS] == list(CALLS)


@pytest.mark.parametrize(("status", "flag", "body", "why"), ROWS, ids=lambda cell: cell[:40])
def test_the_answer_is_as_written(mesh: Mesh, status: str, flag: str, body: str, why: str) -> None:
    """Status, flag, body, and a reason beside it."""
    holding = threading.Thread(target=lambda: mesh.client.get("http://limited/first"))
    mesh.release = asyncio.Event()
    if flag == "UO":  # the one connection that is allowed is in use
        mesh.asked.clear()
        holding.start()
        assert mesh.asked.wait(10)
    answer = (mesh.lost if body == UNANSWERED else mesh.client).get(CALLS[status, flag, body])
    assert answer.status_code == (418 if status == "as set" else int(status))
    assert answer.extensions.get("meshlib.flag", "") == flag
    assert answer.text == ("" if body == "none" else body)
    for name, value in re.findall(r"`([\w-]+): (\w+)`", why):
        assert answer.headers[name] == value
    if flag:
        assert answer.extensions["meshlib.reason"]
    if flag == "UO":
        mesh.peer.loop.call_soon_threadsafe(mesh.release.set)
        holding.join(10)
        assert not holding.is_alive()


def test_what_fails_on_the_wire_raises_what_the_client_raises(mesh: Mesh) -> None:
    """With the flags of the page in its text: nobody listens there, and it was tried again."""
    with pytest.raises(httpx.ConnectError, match=r"\bUF\b.*\bURX\b"):
        mesh.client.get("http://refuses/")
