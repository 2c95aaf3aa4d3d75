"""The last good configuration on disk: read back as it was, or ignored."""

from __future__ import annotations

import logging
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discovery.feed import node
from meshlib.discovery.disk_cache import DiskCache, Memory
from meshlib.xds.resource_types import CLUSTER, LISTENER

MEMORY = Memory("7", ("b:80", "c:80"), {LISTENER: {"b:80": b"\x00\xff", "c:80": None}, CLUSTER: {}})


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "new" / "folder", "127.0.0.1:15010", node())


def test_what_is_kept_comes_back(cache: DiskCache) -> None:
    """The folder is made when first needed, for its owner alone; nothing but the file is left in it."""
    assert cache.load() is None
    cache.save(MEMORY)
    assert cache.load() == MEMORY
    assert DiskCache(cache.path.parent, "127.0.0.1:15010", node()).load() == MEMORY
    assert [*cache.path.parent.iterdir()] == [cache.path]
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.path.parent.stat().st_mode) == 0o700


def test_processes_that_are_alike_share_a_file_and_others_do_not(tmp_path: Path) -> None:
    """Alike is who gets the same configuration; id, address and port change with every start."""

    def path(target: str = "t:1", **fields: object) -> Path:
        return DiskCache(tmp_path, target, replace(node(), **fields)).path  # type: ignore[arg-type]

    workload = node().workload
    assert path() == path(id="other") == path(ready=True) == path(workload=replace(workload, address="::1", port=1))
    others = [
        path("t:2"),
        path(workload=replace(workload, namespace="other")),
        path(workload=replace(workload, labels=(("version", "v2"),))),
        path(workload=replace(workload, name="../../etc/passwd")),
    ]
    assert len({path(), *others}) == 5
    assert {each.parent for each in others} == {tmp_path}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), noise=st.binary(max_size=40))
def test_a_damaged_file_is_ignored_with_a_log_line(
    cache: DiskCache, caplog: pytest.LogCaptureFixture, cut: int, noise: bytes
) -> None:
    """Torn by a power failure, or overwritten with anything: one line that names the file, and no exception."""
    cache.save(MEMORY)
    good = cache.path.read_bytes()
    damaged = good[: min(cut, len(good) - 1)] + noise
    cache.path.write_bytes(damaged)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert cache.load() is None or damaged == good
    assert damaged == good or [str(cache.path) in record.getMessage() for record in caplog.records] == [True]
    cache.path.write_bytes(good)


def test_nothing_is_written_where_nothing_changed(cache: DiskCache) -> None:
    """Also not by a process that found it so."""
    cache.save(MEMORY)
    first = cache.path.stat().st_ino
    cache.save(MEMORY)
    again = DiskCache(cache.path.parent, "127.0.0.1:15010", node())
    again.load()
    again.save(MEMORY)
    assert cache.path.stat().st_ino == first
    again.save(Memory("8"))
    assert cache.load() == Memory("8")


def test_what_is_in_the_way_is_logged_once(cache: DiskCache, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A folder where the file should be, a file where the folder should be: neither load nor save raises."""
    cache.path.mkdir(parents=True)
    assert cache.load() is None
    blocked = DiskCache(tmp_path / "file" / "folder", "t:1", node())
    (tmp_path / "file").write_text("")
    assert blocked.load() is None
    caplog.clear()
    for version in "12":
        cache.save(Memory(version))
        blocked.save(Memory(version))
    assert len(caplog.records) == 2
    assert [*cache.path.parent.iterdir()] == [cache.path], "a temporary file was left behind"
