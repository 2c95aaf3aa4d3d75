"""Which workloads count, while processes and the control plane come and go?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from meshlib.controlplane.registry import Registry, in_order
from meshlib.model import Node, Workload

REVIEWS = Workload("reviews-v1", service="reviews", labels=(("version", "v1"),), address="127.0.0.1", port=9082)
RATINGS = Workload("ratings-v1", service="ratings", address="127.0.0.1", port=9085)


def node(workload: Workload, identity: str = "", ready: bool = True) -> Node:
    return Node(identity or f"sidecar~127.0.0.1~{workload.name}.default~x", workload, ready=ready)


def test_a_workload_counts_while_its_stream_is_open_and_it_is_ready() -> None:
    """Each change is told once."""
    registry, told = Registry(), []
    registry.on_change(lambda: told.append([workload.name for workload in registry.workloads]))
    registry.attach("stream", node(REVIEWS, ready=False))
    registry.attach("stream", node(REVIEWS))
    registry.attach("stream", node(REVIEWS))
    registry.detach("stream")
    registry.detach("stream")
    assert told == [["reviews-v1"], []]


def test_a_process_that_serves_nothing_is_no_endpoint() -> None:
    """A job, a gateway."""
    registry = Registry()
    registry.attach("stream", node(replace(REVIEWS, port=0)))
    assert registry.workloads == ()
    assert len(registry.nodes) == 1


@pytest.mark.parametrize("address", ["", "localhost", "reviews.internal"])
def test_an_endpoint_needs_an_ip_address(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """One that has none, and an Envoy would refuse all endpoints of its cluster."""
    registry = Registry()
    registry.attach(1, node(replace(REVIEWS, address=address)))
    registry.attach(2, node(RATINGS))
    assert registry.workloads == (RATINGS,)
    assert f"{address!r} is not an IP address" in caplog.text


def test_a_second_stream_of_the_same_process_keeps_it_registered() -> None:
    """A reconnect may be seen before the end of the connection that was lost."""
    registry, told = Registry(), []
    registry.attach("old", node(REVIEWS))
    registry.on_change(lambda: told.append(registry.workloads))
    registry.attach("new", node(REVIEWS))
    registry.detach("old")
    assert registry.workloads == (REVIEWS,)
    assert told == []


def test_one_address_has_one_workload() -> None:
    """A process that was started anew, perhaps as something else, takes the place."""
    registry = Registry()
    registry.attach("old", node(REVIEWS))
    later = replace(REVIEWS, name="reviews-v2", labels=(("version", "v2"),))
    registry.attach("new", node(later))
    assert registry.workloads == (later,)


def test_after_a_restart_workloads_count_on_until_the_grace_is_over(tmp_path: Path) -> None:
    """Streams that end because the control plane stops are no reason to forget anybody."""
    file = tmp_path / "workloads.json"
    registry = Registry(file)
    registry.attach(1, node(REVIEWS))
    registry.attach(2, node(RATINGS))
    registry.save()
    registry.freeze()
    registry.detach(1)
    registry.save()

    restarted, told = Registry(file), []
    restarted.load()
    assert restarted.workloads == (RATINGS, REVIEWS)
    restarted.on_change(lambda: told.append(restarted.workloads))
    restarted.attach(1, node(RATINGS))
    assert told == []
    restarted.forget()
    assert told == [(RATINGS,)]


def test_who_leaves_after_coming_back_is_gone_at_once(tmp_path: Path) -> None:
    """The grace is for those who have not been heard of yet."""
    file = tmp_path / "workloads.json"
    registry = Registry(file)
    registry.attach(1, node(REVIEWS))
    registry.save()
    restarted = Registry(file)
    restarted.load()
    restarted.attach(1, node(REVIEWS))
    restarted.detach(1)
    assert restarted.workloads == ()


def test_the_file_is_as_new_as_what_runs(tmp_path: Path) -> None:
    """Who has ended is not remembered, and what has not changed is not written."""
    file = tmp_path / "workloads.json"
    registry = Registry(file)
    registry.attach(1, node(REVIEWS))
    registry.attach(2, node(RATINGS))
    registry.save()
    registry.detach(1)
    registry.save()
    written = file.stat().st_mtime_ns
    registry.save()
    assert file.stat().st_mtime_ns == written
    restarted = Registry(file)
    restarted.load()
    assert restarted.workloads == (RATINGS,)


def test_a_restart_during_the_grace_forgets_nobody(tmp_path: Path) -> None:
    """Who was only remembered is remembered again."""
    file = tmp_path / "workloads.json"
    registry = Registry(file)
    registry.attach(1, node(REVIEWS))
    registry.attach(2, node(RATINGS))
    registry.save()
    second = Registry(file)
    second.load()
    second.attach(1, node(REVIEWS))
    second.freeze()
    second.save()
    third = Registry(file)
    third.load()
    assert third.workloads == (RATINGS, REVIEWS)


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The mesh goes on."""
    registry = Registry(tmp_path / "missing" / "workloads.json")
    registry.load()
    registry.attach(1, node(REVIEWS))
    registry.save()
    assert registry.workloads == (REVIEWS,)
    assert "can't be written" in caplog.text


@pytest.mark.parametrize("text", ["", "[{", "null", '[{"name": 1}]', '{"workloads": []}', "\xff"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Everybody comes back by itself; it takes a moment longer. The log names the file."""
    file = tmp_path / "workloads.json"
    file.write_bytes(text.encode("latin-1"))
    registry = Registry(file)
    registry.load()
    assert registry.workloads == ()
    assert str(file) in caplog.text
    registry.attach(1, node(REVIEWS))
    registry.save()
    assert "reviews-v1" in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["workloads.json"]


def test_each_process_that_comes_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the control plane all come at once: 2,000 took ten seconds, each looking through all."""
    sorted_ = 0

    def counted(workloads: Iterable[Workload]) -> tuple[Workload, ...]:
        nonlocal sorted_
        sorted_ += 1
        return in_order(workloads)

    monkeypatch.setattr("meshlib.controlplane.registry.in_order", counted)
    registry, told = Registry(), []
    registry.on_change(lambda: told.append(True))
    for port in range(1, 101):
        registry.attach(port, node(replace(REVIEWS, port=port)))
    assert (len(told), len(registry.workloads), sorted_) == (100, 100, 1)


def test_an_address_is_not_taken_by_another_account() -> None:
    """Whoever says that bank's address is theirs takes no call of bank's away; once bank has gone, it may be true."""
    registry = Registry()
    registry.attach("bank", node(replace(REVIEWS, service_account="bank")))
    registry.attach("thief", node(replace(RATINGS, port=REVIEWS.port, service_account="thief")))
    assert [each.service_account for each in registry.workloads] == ["bank"]
    registry.detach("bank")
    assert [each.service_account for each in registry.workloads] == ["thief"]
