"""Which objects are in force, and why these? What the folders say, over that Kubernetes, and over that what was
applied.

- An object that was applied wins over the folders' form of it, until it is deleted; then the folders' form is back.
- One that Kubernetes has wins over the folders' form of it too, and is deleted there, not here.
- Applying what the folders say already changes nothing, so later edits of the file still count.
- Deleting an object that only the folders have puts that form out of force, until it changes there.
- What was applied and deleted is in the state folder before the answer is given, so a restart forgets nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import msgspec

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.audit import FOLDER, KUBERNETES, UNKNOWN, Actor, AuditLog, Entry, redacted
from meshlib.controlplane.gathered import Update
from meshlib.controlplane.in_force import Held as Held
from meshlib.controlplane.in_force import InForce, Key, key_of, place_of
from meshlib.controlplane.kinds import Kind, find_kind, named
from meshlib.controlplane.private_files import StateError as StateError
from meshlib.errors import ConfigurationError
from meshlib.istio import closing
from meshlib.istio.parse import parse_text
from meshlib.istio.problems import ConfigurationWarning, by_object, in_order
from meshlib.istio.resources import Object, dump_yaml

logger = logging.getLogger("meshlib.controlplane")

RUNNING = frozenset({"Pod", "Endpoints", "EndpointSlice", "Node"})
"""Kinds of what runs, which nobody writes."""


class UnknownKind(Exception):
    """Nobody has ever heard of such a kind."""


Check = Callable[[Collection[Key]], None]
"""Whether these objects may be changed. Raises what the caller of apply or delete wants to see."""


@dataclass(frozen=True, slots=True)
class Contents:
    """All that is known at one moment; a change makes a new one.

    removed: the folders' objects that were deleted, with the digest of the form that they had then.
    """

    folder: Mapping[Key, Held] = field(default_factory=dict)
    folder_problems: tuple[ConfigurationError, ...] = ()
    kubernetes: Mapping[Key, Held] = field(default_factory=dict)
    kubernetes_problems: tuple[ConfigurationError, ...] = ()
    applied: Mapping[Key, Held] = field(default_factory=dict)
    removed: Mapping[Key, str] = field(default_factory=dict)
    state_problems: tuple[ConfigurationError, ...] = ()

    def in_force(self) -> Mapping[Key, Held]:
        kept = {key: held for key, held in self.folder.items() if key not in self.removed}
        return {**kept, **self.kubernetes, **self.applied}

    def held(self, key: Key) -> Held | None:
        """What is in force of one object."""
        found = self.applied.get(key) or self.kubernetes.get(key)
        return found or (self.folder.get(key) if key not in self.removed else None)

    def origin(self, key: Key) -> str:
        return "applied" if key in self.applied else "kubernetes" if key in self.kubernetes else "folder"


class ObjectStore:
    """The objects in force. Thread-safe.

    state: the folder that keeps what is applied; None keeps it in memory only. audit: is told of every change before it
    is in force; what the first reading of the folders brings is none. Raises StateError when the folder can't be read,
    or when another process uses it.
    """

    def __init__(
        self,
        state: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
        audit: AuditLog | None = None,
    ) -> None:
        self._clock = clock
        self._audit = audit if audit is not None else AuditLog()
        self._has_folder = self._has_kubernetes = False
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._state = StateFolder(state) if state is not None else None
        self._contents = self._state.read() if self._state is not None else Contents()
        self._in_force = InForce(self._contents.in_force())

    def close(self) -> None:
        """Let another process use the state folder."""
        if self._state is not None:
            self._state.close()

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` is called after each change of the objects or their problems, on the thread that made it."""
        self._listeners.append(tell)

    # What is there

    def objects(self) -> tuple[Object, ...]:
        """What is in force, in a fixed order; the very same tuple until something changes."""
        return self._in_force.objects

    def problems(self) -> tuple[ConfigurationError, ...]:
        """Of the folders, Kubernetes and the state folder, and the warnings about what is in force, each with file and
        line."""
        with self._lock:
            contents, warnings = self._contents, self._in_force.warnings()
        return in_order((*contents.folder_problems, *contents.kubernetes_problems, *contents.state_problems, *warnings))

    def stored(self, *, kind: str = "", namespace: str = "", name: str = "") -> list[api.StoredObject]:
        """What is in force, as the admin API shows it. kind: as people write it; "" is any. Raises UnknownKind."""
        wanted = self._kind(kind) if kind else None
        contents = self._contents
        return [
            api.StoredObject(
                kind=key.kind,
                resource=named(key.kind, held.object.api_version).resource,
                namespace=key.namespace,
                name=key.name,
                origin=contents.origin(key),
                source=held.object.source,
                created=held.created,
                changed=held.changed,
                yaml=held.yaml,
            )
            for key, held in self._sorted()
            if (wanted is None or (wanted.kind, wanted.group) == (key.kind, key.group))
            and namespace in ("", key.namespace)
            and name in ("", key.name)
        ]

    def _sorted(self) -> list[tuple[Key, Held]]:
        return sorted(self._contents.in_force().items(), key=lambda item: place_of(item[0]))

    # What changes it

    def set_folder(
        self,
        objects: Iterable[Object],
        problems: Iterable[ConfigurationError] = (),
        warnings: Iterable[ConfigurationWarning] = (),
    ) -> None:
        """This is what the folders hold now, each object once (meshlib.istio.folder)."""
        found = {key_of(each): each for each in objects}
        about = by_object(warnings)
        with self._lock:
            now, contents = self._clock(), self._contents
            folder = _layer(found, contents.folder, now, about)
            removed = {
                key: form for key, form in contents.removed.items() if key in found and _digest(found[key]) == form
            }
            changed = replace(contents, folder=folder, folder_problems=tuple(problems), removed=removed)
            if self._has_folder:
                self._write_down(changed, FOLDER, "folder")
            self._has_folder = True
            if removed != contents.removed and self._state is not None:
                try:
                    self._state.write(changed)
                except StateError as error:  # harmless: what is too much in the file is dropped again at the next start
                    logger.warning("%s", error)
            self._contents, self._in_force = changed, InForce(changed.in_force())
        self._tell()

    def update_kubernetes(self, update: Update) -> None:
        """Kubernetes has these objects in another form than it had, or no more."""
        with self._lock:
            contents, now = self._contents, self._clock()
            layer = dict(contents.kubernetes)
            for key, said in update.objects.items():
                if said is None:
                    layer.pop(key, None)
                else:
                    layer[key] = _held(said.object, layer.get(key), now, said.warnings)
            changed = replace(contents, kubernetes=layer, kubernetes_problems=update.problems)
            if self._has_kubernetes:
                self._write_down(changed, KUBERNETES, "kubernetes", update.objects)
            self._has_kubernetes = True
            self._contents = changed
            self._in_force.update({key: changed.held(key) for key in update.objects})
        self._tell()

    def apply(
        self,
        text: str,
        source: str,
        *,
        namespace: str = "default",
        by: Actor = UNKNOWN,
        check: Check | None = None,
    ) -> api.Results:
        """Put every usable object of this YAML into force, and say what is wrong with the others.

        Raises StateError when it can't be kept, and what `check` raises; then nothing has changed.
        """
        parsed = parse_text(text, source, namespace=namespace)
        if check is not None:
            check([key_of(each) for each in parsed.objects])
        about = by_object(parsed.warnings)
        results = []
        with self._lock:
            now, contents = self._clock(), self._contents
            applied, removed, in_force = dict(contents.applied), dict(contents.removed), contents.in_force()
            for each in parsed.objects:
                key = key_of(each)
                held, in_folder = in_force.get(key), contents.folder.get(key)
                if held is not None and held.object.same_content(each):
                    results.append(_result(each, "unchanged"))
                    continue
                removed.pop(key, None)
                if key in applied or in_folder is None or not in_folder.object.same_content(each):
                    applied[key] = _held(each, held, now, about.get(each.title, ()))
                results.append(_result(each, "created" if held is None else "configured"))
            has_changed = self._change(replace(contents, applied=applied, removed=removed), by, "apply", now)
        if has_changed:
            self._tell()
        return api.Results(
            tuple(results),
            tuple(problem_of(problem) for problem in parsed.problems),
            tuple(problem_of(warning) for warning in parsed.warnings),
        )

    def delete(
        self,
        text: str,
        source: str,
        *,
        namespace: str = "default",
        by: Actor = UNKNOWN,
        check: Check | None = None,
    ) -> api.Results:
        """Put the objects that this YAML names out of force. Raises as apply does."""
        parsed = parse_text(text, source, namespace=namespace)
        results = self._remove([(key_of(each), each.api_version) for each in parsed.objects], by, check)
        return api.Results(results, tuple(problem_of(problem) for problem in parsed.problems))

    def delete_named(
        self, kind: str, namespace: str, name: str, *, by: Actor = UNKNOWN, check: Check | None = None
    ) -> api.Results:
        """Put one object out of force. Raises UnknownKind, and as apply does."""
        known = self._kind(kind)
        version = f"{known.group}/" if known.group else "v1"
        return api.Results(self._remove([(Key(known.group, known.kind, namespace, name), version)], by, check))

    def _remove(
        self, named_objects: Collection[tuple[Key, str]], by: Actor, check: Check | None
    ) -> tuple[api.Result, ...]:
        if check is not None:
            check([key for key, _ in named_objects])
        results = []
        with self._lock:
            contents = self._contents
            applied, removed = dict(contents.applied), dict(contents.removed)
            for key, version in named_objects:
                in_folder = contents.folder.get(key)
                outcome, note = "deleted", ""
                if key in applied:
                    del applied[key]
                    if in_folder is not None and key not in removed:
                        note = f"the form in {in_folder.object.source} is in force again"
                elif in_folder is not None and key not in removed:
                    removed[key] = _digest(in_folder.object)
                    note = f"{in_folder.object.source} still has it: out of force until it changes there"
                else:
                    outcome = "not found"
                if key in contents.kubernetes:
                    note = "Kubernetes has it, and there it can be deleted"
                resource = named(key.kind, version).resource
                results.append(api.Result(key.kind, resource, key.namespace, key.name, outcome, note))
            changed = replace(contents, applied=applied, removed=removed)
            has_changed = self._change(changed, by, "delete", self._clock())
        if has_changed:
            self._tell()
        return tuple(results)

    def _write_down(self, changed: Contents, by: Actor, action: str, among: Iterable[Key] | None = None) -> None:
        """What others have changed already: nobody can be told no."""
        try:
            self._audit.add(_entries(self._contents, changed, by, action, self._clock(), among))
        except StateError as error:
            logger.error("%s", error)

    def _change(self, contents: Contents, by: Actor, action: str, now: float) -> bool:
        """Written first: what the disk does not have was never said to be done. With the lock held."""
        if contents.applied == self._contents.applied and contents.removed == self._contents.removed:
            return False
        entries = _entries(self._contents, contents, by, action, now)
        self._audit.add(entries)
        if self._state is not None:
            try:
                self._state.write(contents)
            except StateError:
                with contextlib.suppress(StateError):
                    self._audit.add([msgspec.structs.replace(each, outcome="failed") for each in entries])
                raise
        self._contents, self._in_force = contents, InForce(contents.in_force())
        return True

    def _tell(self) -> None:
        for tell in self._listeners:
            tell()

    def _kind(self, word: str) -> Kind:
        """A kind that is in the table, or one of an object that is here."""
        known = find_kind(word)
        if known is not None:
            return known
        for held in self._contents.in_force().values():
            kind = named(held.object.kind, held.object.api_version)
            if word.lower() in (kind.kind.lower(), kind.plural, kind.resource, kind.plural_resource):
                return kind
        raise UnknownKind(f'there is no resource type "{word}": write a kind, as virtualservices, or its short name')

    def __repr__(self) -> str:
        contents = self._contents
        return (
            f"<ObjectStore {len(contents.in_force())} objects in force, {len(contents.applied)} of them applied, "
            f"{len(self.problems())} problems>"
        )


def _entries(
    before: Contents, after: Contents, by: Actor, action: str, now: float, among: Iterable[Key] | None = None
) -> list[Entry]:
    """What is otherwise in force after a change, an entry for each object. among: all that can be; None where nobody
    knows."""
    if among is None:
        among = {*before.in_force(), *after.in_force()}
    entries = []
    for key in sorted(among):
        was, now_is = before.held(key), after.held(key)
        if was is now_is:
            continue
        if key.kind in RUNNING or (was is not None and now_is is not None and was.object.same_content(now_is.object)):
            continue
        told, where = (now_is, after) if now_is is not None else (was, before)
        assert told is not None
        entries.append(
            Entry(
                now,
                *by,
                action,
                object=f"{key.kind} {key.namespace}/{key.name}",
                namespace=key.namespace,
                origin=where.origin(key),
                source=told.object.source,
                before=redacted(was.yaml) if was is not None else "",
                after=redacted(now_is.yaml) if now_is is not None else "",
            )
        )
    return entries


def _layer(
    found: Mapping[Key, Object],
    before: Mapping[Key, Held],
    now: float,
    about: Mapping[str, tuple[ConfigurationWarning, ...]],
) -> dict[Key, Held]:
    return {key: _held(each, before.get(key), now, about.get(each.title, ())) for key, each in found.items()}


def _held(new: Object, old: Held | None, now: float, warnings: tuple[ConfigurationWarning, ...]) -> Held:
    if old is None:
        return Held(new, now, now, warnings)
    if old.object is new and old.warnings == warnings:
        return old
    return Held(new, old.created, old.changed if old.object.same_content(new) else now, warnings)


def _digest(given: Object) -> str:
    return hashlib.sha256(dump_yaml(given).encode()).hexdigest()


def _result(given: Object, outcome: str) -> api.Result:
    resource = named(given.kind, given.api_version).resource
    return api.Result(given.kind, resource, given.namespace, given.name, outcome)


def problem_of(error: ConfigurationError) -> api.Problem:
    level = "warning" if isinstance(error, ConfigurationWarning) else "error"
    return api.Problem(error.source, error.object, error.field, error.reason, level)


class _Applied(msgspec.Struct, frozen=True):
    """source: where its author had it. yaml: as it was applied."""

    source: str
    created: float
    changed: float
    yaml: str


class _Removed(msgspec.Struct, frozen=True):
    group: str
    kind: str
    namespace: str
    name: str
    form: str


class _File(msgspec.Struct, frozen=True):
    """What stands in `objects.json`."""

    applied: tuple[_Applied, ...] = ()
    removed: tuple[_Removed, ...] = ()
    version: int = 1


class StateFolder:
    """`objects.json` in a folder, replaced whole at every change; `lock`, held while a process uses it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "objects.json"
        self._unreadable: tuple[tuple[_Applied, frozenset[Key]], ...] = ()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._lock: IO[str] = os.fdopen(handle, "w")
        except OSError as error:
            raise StateError(f"the state folder {folder} can't be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StateError(
                f"the state folder {folder} is in use by another control plane: stop that one, or give another --state"
            ) from None

    def close(self) -> None:
        self._lock.close()

    def read(self) -> Contents:
        """What was kept. An object that this version can't use any more is a problem, and stays in the file; a security
        object refuses whatever it may select, until it is applied anew or deleted (istio/closing.py)."""
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return Contents()
        except OSError as error:
            self.close()
            raise StateError(f"{self._file} can't be read: {error.strerror}") from error
        try:
            found = msgspec.json.decode(text, type=_File)
            if found.version != 1:
                raise msgspec.ValidationError(f"version {found.version} is newer than this control plane")
        except msgspec.DecodeError as error:
            # To start without it would drop what users applied, and the next change would seal that.
            self.close()
            raise StateError(f"{self._file} is damaged ({error}): mend it, or move it away to start empty") from None
        applied: dict[Key, Held] = {}
        problems: list[ConfigurationError] = []
        unreadable: list[tuple[_Applied, frozenset[Key]]] = []
        for each in found.applied:
            parsed = parse_text(each.yaml, str(self._file))
            if parsed.problems:
                unreadable.append((each, frozenset(map(key_of, parsed.closed))))
            for problem in closing.told(parsed.problems, parsed.closed):
                problems.append(ConfigurationError(each.source, problem.object, problem.field, problem.reason))
            for object_ in (*parsed.objects, *parsed.closed):
                kept = replace(object_, source=each.source)
                warnings = tuple(
                    ConfigurationWarning(each.source, warning.object, warning.field, warning.reason)
                    for warning in parsed.warnings
                )
                applied[key_of(kept)] = Held(kept, each.created, each.changed, warnings)
        self._unreadable = tuple(unreadable)
        removed = {Key(each.group, each.kind, each.namespace, each.name): each.form for each in found.removed}
        return Contents(applied=applied, removed=removed, state_problems=tuple(problems))

    def write(self, contents: Contents) -> None:
        applied = tuple(
            _Applied(held.object.source, held.created, held.changed, dump_yaml(held.object))
            for held in contents.applied.values()
            if held.object.unusable is None
        )
        closed = {key for key, held in contents.applied.items() if held.object.unusable is not None}
        unreadable = tuple(each for each, keys in self._unreadable if not keys or keys & closed)
        removed = tuple(_Removed(*key, form) for key, form in contents.removed.items())
        text = msgspec.json.format(msgspec.json.encode(_File((*applied, *unreadable), removed)), indent=1)
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=".objects-")
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
            Path(temporary).replace(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise StateError(f"{self._file} can't be written: {error.strerror}; nothing was changed") from error
