"""What is in force while people edit files?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshlib.istio.folder import Contents, Folder
from promises import within


def service(name: str, port: object = 9080) -> str:
    return f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"


def names(contents: Contents) -> list[str]:
    return [each.name for each in contents.objects]


def ports(contents: Contents) -> list[int]:
    return [each.raw["spec"]["ports"][0]["port"] for each in contents.objects]


def write(path: Path, text: str, age: float = 1.0) -> None:
    """As it looks `age` seconds after it was written."""
    path.write_text(text)
    then = time.time() - age
    os.utime(path, (then, then))


def test_all_yaml_of_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    """Folders below it too; hidden names, as editors and ConfigMap mounts have them, and other suffixes not."""
    (tmp_path / "more").mkdir()
    (tmp_path / "..data").mkdir()
    for name in ("b.yaml", "a.yml", "more/c.json", ".hidden.yaml", "..data/d.yaml", "notes.txt"):
        write(tmp_path / name, service(Path(name).stem.strip(".")))
    contents = Folder([tmp_path]).read()
    assert names(contents) == ["a", "b", "c"]
    assert contents.objects[0].source == f"{tmp_path}/a.yml:1"
    assert contents.problems == ()


def test_the_last_good_form_of_an_object_stays(tmp_path: Path) -> None:
    """Its new form is a problem; the other objects of the file change as they were told to."""
    file = tmp_path / "all.yaml"
    folder = Folder([tmp_path])
    write(file, f"{service('a', 1)}---\n{service('b', 1)}---\n{service('c', 1)}")
    folder.read()
    write(file, f"{service('a', 'many')}---\n{service('b', 22)}", age=2)
    contents = folder.read()
    assert sorted(zip(names(contents), ports(contents), strict=True)) == [("a", 1), ("b", 22)]
    (problem,) = contents.problems
    assert (problem.object, problem.field) == ("Service default/a", "spec.ports[0].port")
    write(file, f"{service('a', 333)}---\n{service('b', 22)}", age=3)
    contents = folder.read()
    assert ports(contents) == [333, 22]
    assert contents.problems == ()


def test_a_file_that_is_no_yaml_any_more_keeps_all_its_objects(tmp_path: Path) -> None:
    """Nobody can say which of them were meant."""
    file = tmp_path / "all.yaml"
    folder = Folder([tmp_path])
    write(file, f"{service('a')}---\n{service('b')}")
    folder.read()
    write(file, service("a") + "  : [", age=2)
    contents = folder.read()
    assert sorted(names(contents)) == ["a", "b"]
    assert "not YAML" in contents.problems[0].reason


def test_an_object_taken_out_is_gone_and_so_is_a_file(tmp_path: Path) -> None:
    """A good edit is believed."""
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    folder = Folder([tmp_path])
    write(first, f"{service('a')}---\n{service('b')}")
    write(second, service("c"))
    assert names(folder.read()) == ["a", "b", "c"]
    write(first, service("b"), age=2)
    second.unlink()
    assert names(folder.read()) == ["b"]


def test_an_object_in_two_files_counts_where_it_is_first(tmp_path: Path) -> None:
    """The second is a problem that names the first."""
    write(tmp_path / "1.yaml", service("a", 1))
    write(tmp_path / "2.yaml", service("a", 2))
    contents = Folder([tmp_path]).read()
    assert ports(contents) == [1]
    assert [str(problem) for problem in contents.problems] == [
        f"{tmp_path}/2.yaml:1: Service default/a: is in {tmp_path}/1.yaml:1 too, and that one counts"
    ]


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """An editor empties it first."""
    file = tmp_path / "a.yaml"
    now = 1_000_000.0
    folder = Folder([tmp_path], clock=lambda: now)
    write(file, service("a"))
    folder.read()
    file.write_text("")
    os.utime(file, (now - 0.01, now - 0.01))
    assert names(folder.read()) == ["a"]
    now += 1
    assert names(folder.read()) == []


def test_what_can_not_be_read_is_a_problem_and_changes_nothing(tmp_path: Path) -> None:
    """Bytes that are no text; a folder that is gone."""
    config = tmp_path / "config"
    config.mkdir()
    folder = Folder([config, tmp_path / "never"])
    write(config / "a.yaml", service("a"))
    assert names(folder.read()) == ["a"]
    (config / "a.yaml").write_bytes(b"\xff\xfe\x00")
    os.utime(config / "a.yaml", (1, 1))
    contents = folder.read()
    assert names(contents) == ["a"]
    assert "not UTF-8" in contents.problems[0].reason
    write(config / "a.yaml", service("a"))
    assert [problem.source for problem in folder.read().problems] == [str(tmp_path / "never")]
    config.rename(tmp_path / "elsewhere")
    contents = folder.read()
    assert names(contents) == ["a"]
    assert {problem.reason for problem in contents.problems} == {"can't be read: No such file or directory"}


class Watching:
    """A watch on a thread; each Contents with the time it came."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._stop, self._changed = folder, threading.Event(), threading.Condition()
        self.seen: list[Contents] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for contents in self._folder.watch(self._stop):
            with self._changed:
                self.seen.append(contents)
                self._changed.notify_all()

    def until(self, wanted: list[str], holds: Callable[[Contents], bool] = lambda _: True) -> float:
        """Seconds until these names are in force, and what else `holds` asks for."""
        began = time.monotonic()
        with self._changed:
            assert self._changed.wait_for(
                lambda: bool(self.seen) and names(self.seen[-1]) == wanted and holds(self.seen[-1]), timeout=10
            )
        return time.monotonic() - began

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watching]:
    write(tmp_path / "a.yaml", service("a"))
    watching = Watching(Folder([tmp_path]))
    yield watching
    watching.stop()


def test_an_edit_is_seen_within_a_second(watching: Watching, tmp_path: Path) -> None:
    """Written in place, replaced by another file as editors do it, in a new folder, and removed."""
    watching.until(["a"])
    (tmp_path / "b.yaml").write_text(service("b"))
    assert watching.until(["a", "b"]) < within(1)
    (tmp_path / "b.new").write_text(service("c"))
    (tmp_path / "b.new").rename(tmp_path / "b.yaml")
    assert watching.until(["a", "c"]) < within(1)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.yaml").write_text(service("d"))
    assert watching.until(["a", "c", "d"]) < within(1)
    (tmp_path / "a.yaml").unlink()
    assert watching.until(["c", "d"]) < within(1)


def test_an_edit_that_changes_no_object_wakes_nobody(watching: Watching, tmp_path: Path) -> None:
    """Comments, and files that are not ours."""
    watching.until(["a"])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "a.yaml").write_text(service("a") + "# a comment\n")
    (tmp_path / "z.yaml").write_text(service("z"))
    watching.until(["a", "z"])
    assert len(watching.seen) == 2


def test_a_single_file_is_watched_through_replacement(tmp_path: Path) -> None:
    """A watch on the file itself would see the first edit only."""
    file = tmp_path / "a.yaml"
    write(file, service("a"))
    (tmp_path / "other.yaml").write_text(service("other"))
    watching = Watching(Folder([file]))
    watching.until(["a"])
    for name in ("b", "c"):
        (tmp_path / "new").write_text(service(name))
        (tmp_path / "new").rename(file)
        assert watching.until([name]) < within(1)
    watching.stop()


def test_a_folder_that_comes_back_is_watched_again(tmp_path: Path) -> None:
    """What it held stays in force meanwhile."""
    config = tmp_path / "config"
    config.mkdir()
    write(config / "a.yaml", service("a"))
    watching = Watching(Folder([config]))
    watching.until(["a"])
    config.rename(tmp_path / "away")
    (tmp_path / "away" / "b.yaml").write_text(service("b"))
    (tmp_path / "away").rename(config)
    watching.until(["a", "b"])
    watching.stop()


def test_an_edit_in_the_same_tick_of_the_clock_is_not_lost(tmp_path: Path) -> None:
    """Same size, same inode, same time stamp: 80 % made 90 % just after the file was read."""
    file = tmp_path / "a.yaml"
    now = 1_000_000.0
    folder = Folder([tmp_path], clock=lambda: now)
    write(file, service("a", 80))
    os.utime(file, (now, now))
    assert ports(folder.read()) == [80]
    write(file, service("a", 90))
    os.utime(file, (now, now))
    now += 1
    assert ports(folder.read()) == [90]


def test_a_file_moved_aside_and_written_anew_is_never_gone(watching: Watching, tmp_path: Path) -> None:
    """vim with `backupcopy=no`: between the two there is no file of that name."""
    watching.until(["a"])
    for name in ("b", "c", "d", "e"):
        (tmp_path / "a.yaml").rename(tmp_path / "a.yaml~")
        time.sleep(0.01)  # the gap that this is about
        (tmp_path / "a.yaml").write_text(service(name))
        assert watching.until([name]) < within(1)
    assert [names(contents) for contents in watching.seen] == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_editors_own_files_are_not_read(tmp_path: Path) -> None:
    """Swap files, backups, locks and half-written copies of vim, emacs, JetBrains and sed."""
    for name in (
        ".a.yaml.swp",
        "a.yaml~",
        "#a.yaml#",
        ".#a.yaml",
        "4913",
        "a.yaml___jb_tmp___",
        "sedXyz",
        "a.yaml.bak",
    ):
        write(tmp_path / name, service("odd"))
    write(tmp_path / "a.yaml", service("a"))
    assert names(Folder([tmp_path]).read()) == ["a"]


def test_a_config_map_mount_is_swapped_whole(tmp_path: Path) -> None:
    """Kubernetes writes a hidden folder and lets the link `..data` point to it, all files at once."""

    def publish(number: int, *services: str) -> None:
        (tmp_path / f"..{number}").mkdir()
        for each in services:
            write(tmp_path / f"..{number}" / f"{each}.yaml", service(each, number))
        (tmp_path / "..data_tmp").symlink_to(f"..{number}")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish(1, "a", "b")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    watching = Watching(Folder([tmp_path]))
    watching.until(["a", "b"])
    publish(2, "a", "b")
    assert watching.until(["a", "b"], lambda contents: ports(contents) == [2, 2]) < within(1)
    watching.stop()
    assert [ports(contents) for contents in watching.seen] == [[1, 1], [2, 2]]


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """It has no blocks on the disk, but would have in memory."""
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    write(tmp_path / "a.yaml", service("a"))
    contents = Folder([tmp_path]).read()
    assert [each.name for each in contents.objects if each.unusable is None] == ["a"]  # beside what closes
    assert str(contents.problems[0]).startswith(f"{tmp_path}/huge.yaml: can't be read: File too large; until")


def test_a_file_whose_name_is_not_utf8_can_be_talked_about(tmp_path: Path) -> None:
    """What is said of its objects goes into JSON, which has no form for other bytes."""
    try:
        write(tmp_path / os.fsdecode(b"\xff.yaml"), service("a") + "---\n" + service("b", "none"))
    except OSError:
        pytest.skip("this file system has no such names")
    contents = Folder([tmp_path]).read()
    assert contents.objects[0].source == f"{tmp_path}/\\xff.yaml:1"
    assert [problem.source for problem in contents.problems] == [f"{tmp_path}/\\xff.yaml:9"]


def test_a_watcher_that_fails_is_no_end_of_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """watchfiles raises its own RuntimeError for what its system says and it has no name for."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("error in underlying watcher")

    monkeypatch.setattr("watchfiles.watch", fail)
    write(tmp_path / "a.yaml", service("a"))
    watching = Watching(Folder([tmp_path]))
    watching.until(["a"])
    write(tmp_path / "b.yaml", service("b"))
    watching.until(["a", "b"])
    watching.stop()
