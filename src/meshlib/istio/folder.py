"""What do some files and folders of YAML hold, now and after every edit? The last good form of an object stays.

- An edit that makes an object unusable is a problem, and the object's last good form stays in force. If the file is no
  YAML any more, nobody can say which objects were meant, so all of them stay.
- A security object that was never usable refuses whatever it may select until it is mended or removed (closing.py).
- An object that is taken out of a file, with its file or without, is gone.
- A file is read once it has been left alone for a moment, and gone once it has been away for one: an editor that
  empties it first, or moves it aside to write a new one, must not empty the mesh.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import watchfiles

from meshlib.errors import ConfigurationError
from meshlib.istio import closing
from meshlib.istio.parse import MAX_TEXT, Parsed, parse_text
from meshlib.istio.problems import ConfigurationWarning, in_order
from meshlib.istio.resources import Object
from meshlib.model.values import dataclass

logger = logging.getLogger("meshlib.istio")

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
SETTLE = 0.05
"""Seconds that a file must have been left alone."""
RESCAN = 0.5
"""Seconds between two looks where the system tells of no changes, as on network and some container mounts."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that is in force, in the order of the files' names, what stands for security objects that can't be
    used, and what is wrong. No object is there twice."""

    objects: tuple[Object, ...] = ()
    problems: tuple[ConfigurationError, ...] = ()
    warnings: tuple[ConfigurationWarning, ...] = ()


Signature = tuple[int, int, int]
UNSURE: Signature = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class _File:
    """signature: of the text that `parsed` is from, UNSURE if that may have changed since without a trace. parsed: with
    the last good forms in it. missed: when it was first looked for and not there."""

    signature: Signature
    parsed: Parsed
    missed: float | None = None


class Folder:
    """Some files and folders. Folders are read with all folders below them; names that begin with a dot are not.

    Belongs to one thread.
    """

    def __init__(self, paths: Sequence[Path], *, clock: Callable[[], float] = time.time) -> None:
        self.paths = tuple(paths)
        self._clock = clock
        self._files: Mapping[Path, _File] = {}
        self._is_unsettled = False
        self._warned = False

    def read(self) -> Contents:
        """What is there now. Only files that have changed are read again. Raises nothing."""
        return self._look(patient=False)

    def _look(self, *, patient: bool) -> Contents:
        files: dict[Path, _File] = {}
        missing: list[ConfigurationError] = []
        self._is_unsettled = False
        for path in self.paths:
            try:
                found = list(_yaml_files(path))
            except OSError as error:
                missing.append(ConfigurationError(str(path), "", "", f"can't be read: {error.strerror}"))
                known = {each: file for each, file in self._files.items() if each.is_relative_to(path)}
                if not known and not isinstance(error, FileNotFoundError):
                    known[path] = _File(UNSURE, Parsed((), (), (), closing.of_the_unknown(missing[-1])))
                files.update(known)
                continue
            for file in found:
                if file not in files:
                    files[file] = self._read(file)
        if patient:
            files.update(self._just_gone(files))
        self._files = files
        return _together([files[path].parsed for path in sorted(files)], missing)

    def _just_gone(self, there: Mapping[Path, _File]) -> Iterator[tuple[Path, _File]]:
        now = time.monotonic()
        for path, file in self._files.items():
            missed = now if file.missed is None else file.missed
            if path not in there and now - missed < SETTLE:
                self._is_unsettled = True
                yield path, replace(file, missed=missed)

    def watch(self, stop: threading.Event) -> Iterator[Contents]:
        """What is there now, and again after each change, until `stop`. Blocks between them."""
        known = self.read()
        yield known
        while not stop.is_set():
            self._wait(stop)
            if stop.is_set():
                return
            found = self._look(patient=True)
            if found != known or any(a.raw != b.raw for a, b in zip(found.objects, known.objects, strict=True)):
                known = found
                yield known

    def _wait(self, stop: threading.Event) -> None:
        """Returns after a change, or when it is time to look anyway."""
        if self._is_unsettled:
            stop.wait(SETTLE)
            return
        folders = [path for path in self.paths if path.is_dir()]
        # An editor may replace a file by a new one, which a watch on the file itself would not see.
        watched = folders or sorted({path.parent for path in self.paths if path.parent.is_dir()})
        try:
            for _ in watchfiles.watch(
                *watched,
                watch_filter=None,
                stop_event=stop,
                debounce=400,
                step=int(SETTLE * 1000),
                rust_timeout=int(RESCAN * 1000),
                yield_on_timeout=True,
                recursive=bool(folders),
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                return
        except (OSError, RuntimeError) as error:  # gone meanwhile, or the system watches no more folders
            if not self._warned:
                logger.warning("%s is looked at every %s s: %s", ", ".join(map(str, watched)), RESCAN, error)
                self._warned = True
        stop.wait(RESCAN)

    def _read(self, path: Path) -> _File:
        old = self._files.get(path)
        try:
            status = path.stat()
            signature = (status.st_mtime_ns, status.st_size, status.st_ino)
            if old is not None and old.signature == signature:
                return replace(old, missed=None)
            if 0 <= self._clock() - status.st_mtime < SETTLE:
                self._is_unsettled = True
                if old is not None and old.signature != UNSURE:
                    return replace(old, missed=None)
                # A file system's clock ticks every few milliseconds: another write may leave the same signature.
                signature = UNSURE
            if status.st_size > 4 * MAX_TEXT:  # so many bytes are more characters than parse_text takes
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            given = path.read_bytes()
        except OSError as error:
            unreadable = ConfigurationError(_shown(path), "", "", f"can't be read: {error.strerror}")
            is_gone = isinstance(error, FileNotFoundError)
            closed = old.parsed.closed if old is not None else () if is_gone else closing.of_the_unknown(unreadable)
            return _File(UNSURE, _with_last_good(Parsed((), (unreadable,), (), closed), old))
        try:
            text = given.decode("utf-8")
        except UnicodeDecodeError as error:
            unreadable = ConfigurationError(_shown(path), "", "", f"is not UTF-8: {error}")
            closed = closing.of_text(given.decode("utf-8", "replace"), unreadable)
            return _File(UNSURE, _with_last_good(Parsed((), (unreadable,), (), closed), old))
        return _File(signature, _with_last_good(parse_text(text, _shown(path)), old))

    def __repr__(self) -> str:
        return f"<Folder {', '.join(map(str, self.paths))} {len(self._files)} files>"


def _shown(path: Path) -> str:
    """A name may be any bytes; where it stands in JSON and in protobuf it must be text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _yaml_files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        path.stat()
        yield path
        return
    next(path.iterdir(), None)  # rglob says nothing of a folder that may not be read
    for found in path.rglob("*"):
        hidden = any(part.startswith(".") for part in found.relative_to(path).parts)
        if found.suffix in SUFFIXES and not hidden and found.is_file():
            yield found


def _with_last_good(new: Parsed, old: _File | None) -> Parsed:
    if old is None or not new.problems:
        return new
    bad = {problem.object for problem in new.problems}
    there = {closing.identity(each) for each in new.objects}
    kept = [
        each for each in old.parsed.objects if closing.identity(each) not in there and (each.title in bad or "" in bad)
    ]
    # What can't be told by its name in a text that is no YAML is, where one of its kind was there before, that one.
    broken = {problem for problem in new.problems if not problem.object}
    kinds = {each.kind for each in kept}
    closed = [each for each in new.closed if each.namespace or each.unusable not in broken or each.kind not in kinds]
    titles = {each.title for each in kept}
    warnings = [warning for warning in old.parsed.warnings if warning.object in titles]
    return replace(new, objects=(*new.objects, *kept), warnings=(*new.warnings, *warnings), closed=tuple(closed))


def _together(parts: Sequence[Parsed], problems: Sequence[ConfigurationError]) -> Contents:
    """All files' objects. One that is in two files counts once, where it is first by the files' names."""
    found: dict[tuple[str, ...], Object] = {}
    told = list(problems)
    for part in parts:
        told.extend(part.problems)
        for each in part.objects:
            first = found.setdefault(closing.identity(each), each)
            if first is not each:
                told.append(
                    ConfigurationError(each.source, each.title, "", f"is in {first.source} too, and that one counts")
                )
    usable = tuple(found.values())
    sources = {each.source for each in usable}
    warnings = [warning for part in parts for warning in part.warnings if warning.source in sources]
    closed = closing.missing(set(map(closing.identity, usable)), (each for part in parts for each in part.closed))
    return Contents((*usable, *closed), in_order(closing.told(told, closed)), tuple(warnings))
