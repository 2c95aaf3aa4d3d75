"""The feed over xDS, from a real gRPC server: what is wanted comes, stays, and is let go."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ads_peer import AdsPeer
from discovery.feed import Feed, feed, gateway, hosts, node, ports, world
from meshlib.discovery import xds as xds_source
from meshlib.discovery.disk_cache import DiskCache
from meshlib.discovery.xds import XdsSource
from meshlib.model import Forward, Route, RouteConfiguration, RouteMatch, Snapshot, WeightedCluster
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE
from promises import within

both = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])


@pytest.fixture
def peer():
    with AdsPeer() as peer:
        yield peer


@both
def test_a_host_that_is_called_is_asked_for_and_comes_whole(peer: AdsPeer, delta: bool) -> None:
    """want(authority) leads to listener, routes, cluster and endpoints, in one consistent Snapshot."""
    peer.serve(world("b:80", "c:80"))
    with feed(peer.target, delta=delta) as running:
        running.source.want("b:80")
        snapshot = running.wait_for(hosts)
    assert snapshot.same_content(world("b:80"))
    assert all(published.inconsistencies() == () for published in running.published)
    assert len(running.published) == 1, "half of a host was published"


@both
def test_a_host_that_does_not_exist_is_absent_until_it_is_born(peer: AdsPeer, delta: bool) -> None:
    """The server's word that there is none is published; when the host is born, it is pushed unasked."""
    peer.serve(world("c:80"))
    with feed(peer.target, delta=delta) as running:
        running.source.want("c:80")
        running.wait_for(hosts)
        if not delta:  # a whole set says what is missing only to who was seen before; the timer is the session's claim
            peer.serve(world("b:80", "c:80"))
            running.source.want("b:80")
            running.wait_for(lambda s: hosts(s) == ["b:80", "c:80"])
            peer.serve(world("c:80"))
        else:
            running.source.want("b:80")
        assert running.wait_for(lambda s: s.absent == ("b:80",))
        peer.serve(world("b:80", "c:80"))
        assert running.wait_for(lambda s: hosts(s) == ["b:80", "c:80"]).absent == ()


@both
def test_an_edit_is_live_without_a_gap(peer: AdsPeer, delta: bool) -> None:
    """Routes move to another cluster: no Snapshot in between lacks the cluster or its endpoints."""
    peer.serve(world("b:80", port=1))
    with feed(peer.target, delta=delta) as running:
        running.source.want("b:80")
        running.wait_for(hosts)
        peer.serve(world("b:80", port=2, subset="v2"))
        running.wait_for(lambda s: ports(s) == [2])
    for snapshot in running.published:
        there = {cluster.name for cluster in snapshot.clusters}
        named = {
            each.cluster
            for routes in snapshot.route_configurations
            for route in routes.virtual_hosts[0].routes
            if isinstance(route.action, Forward)
            for each in route.action.clusters
        }
        assert named <= there and len(ports(snapshot)) == len(there)


@both
def test_what_is_no_longer_referenced_is_unsubscribed(peer: AdsPeer, delta: bool) -> None:
    """Cluster and endpoints of the old route are given up once the new ones serve."""
    v1, v2 = world("b:80", subset="v1"), world("b:80", subset="v2")
    with feed(peer.target, delta=delta) as running:
        running.source.want("b:80")
        stream = peer.accept()
        for each in (v1, v2):
            peer.serve(each)
            running.wait_for(lambda s, each=each: s.same_content(each))
        for type_url in (CLUSTER, ENDPOINT):
            names: list[str] = []
            while names != (["outbound|v1|b:80"] if delta else ["outbound|v2|b:80"]):
                request = stream.next_of(type_url)
                names = [*(request.resource_names_unsubscribe if delta else request.resource_names)]


def test_a_gateway_is_told_of_everything_without_asking(peer: AdsPeer) -> None:
    """A ROUTER subscribes listeners and clusters by wildcard; its Snapshot is complete; what goes is gone."""
    peer.serve(world("b:80", "c:80"))
    with feed(peer.target, of=gateway()) as running:
        snapshot = running.wait_for(lambda s: hosts(s) == ["b:80", "c:80"])
        assert snapshot.complete
        peer.serve(world("c:80"))
        running.wait_for(lambda s: hosts(s) == ["c:80"] and len(s.clusters) == 1)
        peer.serve(Snapshot())
        assert running.wait_for(lambda s: not s.listeners).complete


@both
def test_the_control_planes_death_changes_nothing_and_its_return_everything(peer: AdsPeer, delta: bool) -> None:
    """What is known serves on while nobody answers; edits made meanwhile arrive after the reconnect."""
    peer.serve(world("b:80", port=1))
    with feed(peer.target, delta=delta) as running:
        running.source.want("b:80")
        running.wait_for(hosts)
        before = len(running.published)
        peer.stop()
        running.source.want("c:80")  # while it is down: asked for later
        peer.serve(world("b:80", "c:80", port=2))
        peer.start()
        running.wait_for(lambda s: ports(s) == [2, 2])
        assert all(hosts(s)[:1] == ["b:80"] for s in running.published[before - 1 :])


def test_what_was_deleted_during_an_outage_is_gone_after_it(peer: AdsPeer) -> None:
    """Delta: what the client held and the server lacks is removed on reconnect."""
    peer.serve(world("b:80", "c:80"))
    with feed(peer.target) as running:
        running.source.want("b:80")
        running.source.want("c:80")
        running.wait_for(lambda s: len(hosts(s)) == 2)
        peer.stop()
        peer.serve(world("c:80"))
        peer.start()
        running.wait_for(lambda s: hosts(s) == ["c:80"] and s.absent == ("b:80",))


@both
def test_a_bad_resource_is_refused_by_name_and_the_rest_applies(
    peer: AdsPeer, delta: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """NACK and log name type, resource and field; its last good form and everything else stay in force."""
    good = world("b:80", "c:80")
    peer.serve(good)
    with feed(peer.target, delta=delta) as running, caplog.at_level(logging.WARNING, "meshlib"):
        running.source.want("b:80")
        running.source.want("c:80")
        running.wait_for(lambda s: len(hosts(s)) == 2)
        bad = RouteConfiguration(
            "routes of b:80", (replace(good.route_configurations[0].virtual_hosts[0], domains=()),)
        )
        to_nowhere = Route(RouteMatch(), Forward((WeightedCluster("nowhere"),)))
        other = replace(
            good.route_configurations[1],
            virtual_hosts=(replace(good.route_configurations[1].virtual_hosts[0], routes=(to_nowhere,)),),
        )
        peer.serve(replace(good, route_configurations=(bad, other)))
        # The NACK, not the Snapshot, is waited for: the other route has an absent cluster now.
        nack = peer.nacks.get(timeout=10)
    assert nack.type_url == ROUTE
    assert "RouteConfiguration 'routes of b:80'" in nack.error_detail.message
    assert "domains" in nack.error_detail.message
    assert good.route_configurations[0] in running.snapshot.route_configurations
    (line,) = {r.getMessage() for r in caplog.records if "can't be used" in r.getMessage()}
    assert "routes of b:80" in line and "domains" in line and peer.target in line


def test_a_feed_that_talks_nonsense_is_followed_no_less(peer: AdsPeer) -> None:
    """Noise instead of messages, a type never asked for: the client reconnects or ignores it, and raises nothing."""
    with feed(peer.target) as running:
        running.source.want("b:80")
        stream = peer.accept()
        stream.next_of(LISTENER)
        stream.send("type.googleapis.com/nobody.asked", version="7")
        stream.send(LISTENER, raw={"b:80": b"\xff\xff\xff"})
        assert "b:80" in stream.next_of(LISTENER).error_detail.message
        stream.send_bytes(b"\xff\xff\xff\xff")
        again = peer.accept()
        request = again.next_of(LISTENER)
        assert [*request.resource_names_subscribe] == ["b:80"]
        peer.serve(world("b:80"))
        again.send(LISTENER, *world("b:80").listeners)
        running.wait_for(hosts)


def test_readiness_is_told_on_the_open_stream(peer: AdsPeer) -> None:
    """A process registers when its own port accepts: the node is sent again, on the same stream, and on later ones."""
    with feed(peer.target) as running:
        stream = peer.accept()
        first = stream.next()
        assert first.HasField("node") and first.node.metadata["MESHLIB_READY"] is False
        running.source.set_ready()
        second = stream.next()
        assert second.node.metadata["MESHLIB_READY"] is True
        assert not second.resource_names_subscribe and not second.resource_names_unsubscribe
        stream.close()
        assert peer.accept().next().node.metadata["MESHLIB_READY"] is True


def test_wanting_again_says_nothing_again(peer: AdsPeer) -> None:
    """want is idempotent, from any number of threads, and refuses what would ask for everything."""
    peer.serve(world("b:80"))
    with feed(peer.target) as running:
        threads = [
            threading.Thread(target=lambda: [running.source.want(a) for a in ("b:80", "*", "", "é:80", "x" * 600)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        running.wait_for(hosts)
        stream = peer.accept()
        asked: list[str] = []
        while "end:1" not in asked:
            asked += stream.next_of(LISTENER).resource_names_subscribe
            running.source.want("end:1")
    assert asked == ["b:80", "end:1"]


def test_hosts_beyond_the_limit_let_go_the_oldest(peer: AdsPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that calls ever new hosts subscribes to a bounded number, and asks again for one that was let go."""
    monkeypatch.setattr(xds_source, "MAX_WANTED", 2)
    peer.serve(world("b:80", "c:80", "d:80"))
    with feed(peer.target) as running:
        for host in ("b:80", "c:80", "d:80"):
            running.source.want(host)
            running.wait_for(lambda s, host=host: host in hosts(s))
        assert hosts(running.snapshot) == ["c:80", "d:80"]
        running.source.want("b:80")
        running.wait_for(lambda s: hosts(s) == ["b:80", "d:80"])


# Memory


@both
def test_a_start_without_a_control_plane_begins_where_the_last_process_ended(
    peer: AdsPeer, tmp_path: Path, delta: bool
) -> None:
    """The last good configuration is on disk; a process like the first finds it, though nobody answers."""
    peer.serve(world("b:80"))
    with feed(peer.target, tmp_path, delta=delta) as first:
        first.source.want("b:80")
        first.wait_for(hosts)
    peer.stop()
    other = node("sidecar~127.0.0.1~a-2.default~default.svc.cluster.local")
    with feed(peer.target, tmp_path, delta=delta, of=other) as second:
        kept = second.wait_for(hosts, timeout=within(3))
        assert kept.same_content(world("b:80"))
        assert kept.version.endswith("(kept)")
        peer.serve(world("b:80", port=2))
        peer.start()
        second.wait_for(lambda s: ports(s) == [2])


def test_a_control_plane_that_no_connection_can_be_made_for_leaves_the_memory(peer: AdsPeer, tmp_path: Path) -> None:
    """Whose root can't be had, say, since nobody is there: that fails before there is any stream."""
    peer.serve(world("b:80"))
    with feed(peer.target, tmp_path) as first:
        first.source.want("b:80")
        first.wait_for(hosts)

    def refused(options: Any) -> Any:
        raise ConnectionRefusedError("nobody is there")

    with Feed(XdsSource(peer.target, node(), cache_dir=tmp_path, connect=refused)) as second:
        assert second.wait_for(hosts).same_content(world("b:80"))


@both
def test_what_is_on_disk_waits_for_a_control_plane_that_answers(peer: AdsPeer, tmp_path: Path, delta: bool) -> None:
    """Endpoints of yesterday are never called where today's can be had."""
    peer.serve(world("b:80", port=1))
    with feed(peer.target, tmp_path, delta=delta) as first:
        first.source.want("b:80")
        first.wait_for(hosts)
    peer.serve(world("b:80", port=2))
    with feed(peer.target, tmp_path, delta=delta) as second:
        second.wait_for(hosts)
    assert [ports(snapshot) for snapshot in second.published] == [[2]]


def test_what_is_on_disk_serves_when_a_control_plane_is_there_and_silent(
    peer: AdsPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for ever."""
    monkeypatch.setattr(xds_source, "FIRST_ANSWER", 0.05)
    peer.serve(world("b:80"))
    with feed(peer.target, tmp_path) as first:
        first.source.want("b:80")
        first.wait_for(hosts)
    with AdsPeer() as silent:
        # The same file: it is named after the target.
        for file in tmp_path.iterdir():
            file.rename(DiskCache(tmp_path, silent.target, node()).path)
        with feed(silent.target, tmp_path) as second:
            assert second.wait_for(hosts).same_content(world("b:80"))


def test_what_was_deleted_while_a_process_was_down_does_not_come_back(peer: AdsPeer, tmp_path: Path) -> None:
    """A gateway that starts from disk hears of what went meanwhile, though it asks for nothing by name."""
    peer.serve(world("b:80", "c:80"))
    with feed(peer.target, tmp_path, of=gateway()) as first:
        first.wait_for(lambda s: len(hosts(s)) == 2)
    peer.serve(world("c:80"))
    with feed(peer.target, tmp_path, of=gateway()) as second:
        second.wait_for(hosts)
    assert [hosts(snapshot) for snapshot in second.published] == [["c:80"]]


def test_changes_are_written_while_the_process_runs(
    peer: AdsPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed has left its configuration: it is written soon after a change, not at the end."""
    monkeypatch.setattr(xds_source, "SAVE_AFTER", 0.01)
    written = threading.Event()
    save = DiskCache.save
    monkeypatch.setattr(DiskCache, "save", lambda self, memory: (save(self, memory), written.set()))
    peer.serve(world("b:80"))
    with feed(peer.target, tmp_path) as running:
        running.source.want("b:80")
        assert written.wait(10)
        memory = DiskCache(tmp_path, peer.target, node()).load()
    assert memory is not None and memory.wanted == ("b:80",)
    assert [*memory.resources[LISTENER]] == ["b:80"]


def test_a_folder_that_cannot_be_written_costs_the_memory_only(
    peer: AdsPeer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line, and the feed goes on."""
    (tmp_path / "file").write_text("in the way")
    peer.serve(world("b:80"))
    with feed(peer.target, tmp_path / "file" / "cache") as running:
        running.source.want("b:80")
        running.wait_for(hosts)
    assert [r.levelname for r in caplog.records if "next start" in r.getMessage()] == ["WARNING"]


# The end, and the fork


def test_stop_is_quick_whatever_is_going_on(peer: AdsPeer) -> None:
    """Before run, with a stream open, and in the pause between two attempts; no thread is left behind."""
    before = set(threading.enumerate())
    peer.serve(world("b:80"))
    unused = Feed(XdsSource(peer.target, node(), cache_dir=None))
    unused.source.stop()
    began = time.monotonic()
    with unused:
        pass
    with feed(peer.target) as running:
        running.source.want("b:80")
        running.wait_for(hosts)
    peer.stop()
    with feed(peer.target):
        pass
    assert time.monotonic() - began < within(3)
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)  # the server's own, and grpcio's, which end with their stream
    assert {t.name for t in set(threading.enumerate()) - before} == set()


def test_a_publisher_that_raises_does_not_end_the_feed(peer: AdsPeer, caplog: pytest.LogCaptureFixture) -> None:
    """A defect elsewhere is logged; the next configuration is published all the same."""
    peer.serve(world("b:80"))
    published: list[Snapshot] = []
    second = threading.Event()

    def publish(snapshot: Snapshot) -> None:
        published.append(snapshot)
        if len(published) == 1:
            raise ValueError("a defect")
        second.set()

    source = XdsSource(peer.target, node(), cache_dir=None)
    thread = threading.Thread(target=source.run, args=(publish,), daemon=True)
    thread.start()
    source.want("b:80")
    try:
        while not published:
            peer.accept()
        peer.serve(world("b:80", port=2))
        assert second.wait(10)
    finally:
        source.stop()
        thread.join(10)
    assert any("error of the client" in record.getMessage() for record in caplog.records)


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("GRPC_ENABLE_FORK_SUPPORT", None)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_that_just_ends_says_nothing(peer: AdsPeer) -> None:
    """The interpreter exits with the stream open: quickly, with its own exit code, and nothing on stderr."""
    peer.serve(world("b:80"))
    began = time.monotonic()
    done = _run(
        """
        import sys
        from discovery.feed import feed, hosts
        running = feed(sys.argv[1]).__enter__()
        running.source.want("b:80")
        running.wait_for(hosts)
        sys.exit(3)
        """,
        peer.target,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert time.monotonic() - began < 10.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_feed_of_its_own(peer: AdsPeer) -> None:
    """Parent and child follow the control plane side by side; the child's end does not end the parent's stream."""
    peer.serve(world("b:80", "c:80"))
    done = _run(
        """
        import gc, os, sys
        from discovery.feed import feed, hosts, node
        parent = feed(sys.argv[1]).__enter__()
        parent.source.want("b:80")
        parent.wait_for(hosts)
        pid = os.fork()
        if pid == 0:
            parent = None
            gc.collect()
            with feed(sys.argv[1], of=node("sidecar~127.0.0.1~a-2.default~default.svc.cluster.local")) as child:
                child.source.want("c:80")
                child.wait_for(lambda s: hosts(s) == ["c:80"])
            sys.exit(4)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 4, status
        parent.source.want("c:80")
        parent.wait_for(lambda s: hosts(s) == ["b:80", "c:80"])
        parent.stop()
        """,
        peer.target,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len({each.id for each in peer.nodes}) == 2
