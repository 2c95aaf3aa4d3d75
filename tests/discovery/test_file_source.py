"""What does a process see that reads a folder itself?"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import meshlib
from discovery.feed import Feed, node
from meshlib.discovery.file import FolderSource
from meshlib.model import Snapshot
from peers import Answer, Peer
from promises import within

MIRROR = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: reviews}
spec:
  hosts: [reviews.example]
  ports: [{number: 9080, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints: [{address: 127.0.0.1, ports: {http: %d}}]
"""
GREETING = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews.example]
  http:
  - directResponse: {status: %d}
"""


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Feed]:
    (tmp_path / "mesh.yaml").write_text(MIRROR % 1)
    with Feed(FolderSource(tmp_path, node())) as feed:
        yield feed


def number(feed: Feed, count: int) -> Snapshot:
    """The snapshot with this number, from 1."""
    feed.wait_for(lambda _: len(feed.published) >= count)
    return feed.published[count - 1]


def test_a_folder_is_a_complete_snapshot(feed: Feed) -> None:
    """So no call has to wait for an answer about a host."""
    snapshot = number(feed, 1)
    assert snapshot.complete
    assert snapshot.inconsistencies() == ()
    assert "reviews.example:9080" in [listener.name for listener in snapshot.listeners]


def test_an_edit_is_a_new_snapshot_and_a_comment_is_none(feed: Feed, tmp_path: Path) -> None:
    """What changes nothing wakes nobody."""
    first = number(feed, 1)
    (tmp_path / "mesh.yaml").write_text((MIRROR % 1) + "# a comment\n")
    (tmp_path / "greeting.yaml").write_text(GREETING % 204)
    second = number(feed, 2)
    assert first.version != second.version
    assert not first.same_content(second)
    assert len(feed.published) == 2


def test_a_problem_is_logged_once_and_changes_nothing(
    feed: Feed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With file, object, field and reason."""
    number(feed, 1)
    with caplog.at_level(logging.INFO, "meshlib.discovery"):
        (tmp_path / "mesh.yaml").write_text((MIRROR % 1).replace("hosts:", "hots:"))
        (tmp_path / "greeting.yaml").write_text(GREETING % 204)
        number(feed, 2)
        (tmp_path / "greeting.yaml").write_text(GREETING % 205)
        third = number(feed, 3)
    told = [record.getMessage() for record in caplog.records if "hots" in record.getMessage()]
    assert told == [f"{tmp_path}/mesh.yaml:6: ServiceEntry default/reviews: spec.hots: there is no such field"]
    assert "reviews.example:9080" in [listener.name for listener in third.listeners]


def test_stop_before_run_ends_it_at_once(tmp_path: Path) -> None:
    """As when a Mesh is closed while it starts."""
    source = FolderSource(tmp_path, node())
    source.stop()
    began = time.monotonic()
    source.run(lambda snapshot: None)
    assert time.monotonic() - began < within(1)


def test_a_client_is_steered_by_a_folder_without_a_control_plane(tmp_path: Path) -> None:
    """meshlib.connect("folder/"): a real call, and another one after an edit."""
    with Peer(lambda received: Answer(200, b"hello")) as peer:
        (tmp_path / "mesh.yaml").write_text(MIRROR % peer.port)
        with meshlib.connect(tmp_path) as mesh, httpx.Client(transport=mesh.transport()) as client:
            assert client.get("http://reviews.example:9080/").text == "hello"
            (tmp_path / "greeting.yaml").write_text(GREETING % 204)
            deadline = time.monotonic() + 1
            while client.get("http://reviews.example:9080/").status_code != 204:
                assert time.monotonic() < deadline
