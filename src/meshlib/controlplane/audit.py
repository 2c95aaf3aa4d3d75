"""Who changed what, when, and how was it before? The audit log: JSON lines, and the last of them in memory.

A line is on the disk before the change that it tells of is in force; where it can't be written, nothing is changed.
The file is opened anew for each line, so that it may be renamed to rotate it. Secrets are not in it (`redacted`).
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from meshlib.controlplane.private_files import StateError, read_private

logger = logging.getLogger("meshlib.controlplane.audit")

MOST = 2000
"""Entries that are kept in memory, and read from the end of the file at the start."""
TAIL = 16 * 1024 * 1024
"""Bytes of the file that are looked at for them."""
REDACTED = "[redacted]"


class Actor(NamedTuple):
    """Who acts. who: as grants name them. method: token, oidc, kubernetes, certificate, open (nobody was asked) or
    folder. address: of the connection. agent: what the client calls itself, unverified."""

    who: str
    method: str = ""
    address: str = ""
    agent: str = ""


FOLDER, KUBERNETES = Actor("folder", "folder"), Actor("kubernetes", "kubernetes")
UNKNOWN = Actor("unknown")


class Entry(msgspec.Struct, frozen=True):
    """One line. at: seconds since 1970. action: apply, delete, folder, kubernetes, token create, token revoke, sign in,
    tap, logs, ca begin, ca switch, ca finish. outcome: ok, denied (the role does not allow it), failed. object:
    `Service d/a`.

    origin: `folder`, `kubernetes` or `applied`. source: the file it came from. before, after: YAML, "" where there was,
    or is, none.
    """

    at: float
    who: str
    method: str
    address: str
    agent: str
    action: str
    outcome: str = "ok"
    object: str = ""
    namespace: str = ""
    origin: str = ""
    source: str = ""
    before: str = ""
    after: str = ""
    note: str = ""


class Entries(msgspec.Struct, frozen=True):
    """The oldest first."""

    entries: tuple[Entry, ...] = ()


class AuditLog:
    """Thread-safe. file: None keeps the last entries in memory only. clock: seconds since 1970.

    Raises StateError where the file can't be read or written, or others can read it.
    """

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._file, self._clock = file, clock
        self._lock = threading.Lock()
        self._last: deque[Entry] = deque(maxlen=MOST)
        self._listeners: list[Callable[[Sequence[Entry]], None]] = []
        if file is not None:
            self._last.extend(_tail(file))
            self._write(b"")  # now, rather than at the first change

    def on_entries(self, tell: Callable[[Sequence[Entry]], None]) -> None:
        """`tell` is called with what was written, on the thread that wrote it."""
        self._listeners.append(tell)

    def write(self, by: Actor, action: str, **fields: str) -> None:
        """One entry, now. Raises StateError when it can't be kept."""
        self.add([Entry(self._clock(), *by, action, **fields)])

    def add(self, entries: Sequence[Entry]) -> None:
        """All of them, or none. Raises StateError when they can't be kept."""
        if not entries:
            return
        with self._lock:
            self._write(b"".join(msgspec.json.encode(each) + b"\n" for each in entries))
            self._last.extend(entries)
        for tell in self._listeners:
            tell(entries)

    def entries(self, since: float = 0.0, limit: int = MOST) -> list[Entry]:
        """The last `limit` since then, the oldest first."""
        with self._lock:
            found = [each for each in self._last if each.at >= since]
        return found[-limit:] if limit else []

    def _write(self, text: bytes) -> None:
        if self._file is None:
            return
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while text:  # appended in one piece but where the disk is about to be full
                    text = text[os.write(handle, text) :]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise StateError(
                f"the audit log {self._file} can't be written: {error.strerror}; nothing was changed"
            ) from (error)

    def __repr__(self) -> str:
        return f"<AuditLog {self._file or 'in memory'}>"


def _tail(file: Path) -> list[Entry]:
    content = read_private(file)
    if content is None:
        return []
    found = []
    for line in content[-TAIL:].splitlines()[-MOST:]:
        try:
            found.append(msgspec.json.decode(line, type=Entry))
        except msgspec.DecodeError:
            continue  # cut off by a full disk, or by TAIL
    return found


# Secrets

_SECRET_KEYS = re.compile(
    r"authorization|proxyauthorization|cookie|setcookie|password|passwd|token|secret|apikey|xapikey|privatekey|"
    r"clientsecret|accesskey|secretkey"
)
_SECRET_KINDS = frozenset({"Secret"})
_PRIVATE_JWK = frozenset({"d", "p", "q", "dp", "dq", "qi", "k"})


def redacted(text: str) -> str:
    """The YAML of one object without what must not be read in a log: values of a Secret, credentials in headers,
    private keys. What can't be read as YAML is left out whole."""
    if not text:
        return text
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return REDACTED
    is_secret = isinstance(found, dict) and found.get("kind") in _SECRET_KINDS
    clean = _clean(found, is_secret)
    return text if clean == found else yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)


def _clean(value: Any, is_secret: bool) -> Any:
    if isinstance(value, list):
        return [_clean(each, is_secret) for each in value]
    if isinstance(value, str):
        return REDACTED if "PRIVATE KEY-----" in value else _clean_json(value)
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for key, each in value.items():
        plain = re.sub(r"[^a-z0-9]", "", str(key).lower())
        if is_secret and key in ("data", "stringData") and isinstance(each, dict):
            found[key] = dict.fromkeys(each, REDACTED)
        elif is_secret and key == "annotations" and isinstance(each, dict):
            found[key] = {name: text for name, text in each.items() if "last-applied" not in str(name)}
        elif "authorization" in plain and isinstance(each, dict):  # how a header is matched
            found[key] = dict.fromkeys(each, REDACTED)
        elif isinstance(each, str | int) and not isinstance(each, bool) and _SECRET_KEYS.fullmatch(plain):
            found[key] = REDACTED
        else:
            found[key] = _clean(each, is_secret)
    return found


def _clean_json(text: str) -> str:
    """A key set in one text (`jwtRules[].jwks`) whose author has pasted the private half, too."""
    if '"keys"' not in text and '"kty"' not in text:
        return text
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    keys = found.get("keys", [found]) if isinstance(found, dict) else []
    is_private = isinstance(keys, list) and any(isinstance(each, dict) and _PRIVATE_JWK & each.keys() for each in keys)
    return REDACTED if is_private else text
