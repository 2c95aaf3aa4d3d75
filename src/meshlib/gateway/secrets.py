"""Which certificate has the name that a Gateway's `credentialName` gives? Secrets in a folder, as they are now.

Either a folder of that name in it, as Kubernetes mounts a Secret (`tls.crt`, `tls.key`, `ca.crt`), or an object of kind
Secret in one of its YAML files. Keys are Istio's: `cert`, `key` and `cacert` too, and a CA in the Secret `NAME-cacert`.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from meshlib.istio.documents import InvalidYaml, split

_log = logging.getLogger("meshlib.gateway")

CA_SUFFIX = "-cacert"
_KEYS = {"chain": ("tls.crt", "cert"), "key": ("tls.key", "key"), "roots": ("ca.crt", "cacert")}
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_SUFFIXES = (".yaml", ".yml", ".json")
TOGETHER = 0.1
"""Seconds."""
LARGEST = 4 * 1024 * 1024
"""Bytes of a YAML file."""


class Pem(NamedTuple):
    """What a Secret holds, "" where it holds none. No repr of it is ever logged."""

    chain: bytes = b""
    key: bytes = b""
    roots: bytes = b""

    def __repr__(self) -> str:
        return "<Pem>"


class NotYetKnown(Exception):
    """Whether there is such a Secret: nobody has answered yet."""


class SecretSource(Protocol):
    """Asked at handshakes, on the event loop: it never waits for another machine."""

    def find(self, name: str, *, roots: bool = True) -> Pem | None:
        """The Secret as it is now; None when there is none. roots: whether its CA is needed, too. Raises OSError where
        it can't be read, NotYetKnown before it could be."""


class Secrets:
    """folder: where they are; None: there are none. namespace: the gateway's own; a Secret of another is not its.
    Belongs to one thread."""

    def __init__(self, folder: Path | None, namespace: str) -> None:
        self._folder, self._namespace = folder, namespace
        self._files: dict[Path, tuple[tuple[int, ...], Mapping[str, Pem]]] = {}
        self._found: Mapping[str, Pem] = {}
        self._looked_at = float("-inf")

    def find(self, name: str, *, roots: bool = True) -> Pem | None:
        """The Secret, read anew; the CA of its own or of `NAME-cacert`. None when there is none. Raises OSError."""
        if self._folder is None or not NAME.fullmatch(name):
            return None
        written = self._written()
        found = self._mounted(name) or written.get(name)
        if found is None or found.roots or not roots:
            return found
        beside = self._mounted(name + CA_SUFFIX) or written.get(name + CA_SUFFIX) or Pem()
        return found._replace(roots=beside.roots)

    def _mounted(self, name: str) -> Pem | None:
        assert self._folder is not None
        place = self._folder / name
        if not place.is_dir():
            return None

        def read(names: tuple[str, ...]) -> bytes:
            return next((file.read_bytes() for each in names if (file := place / each).is_file()), b"")

        return Pem(**{part: read(names) for part, names in _KEYS.items()})

    def _written(self) -> Mapping[str, Pem]:
        """Those in YAML files, of which only the changed ones are read; many that are asked for at once look once."""
        assert self._folder is not None
        if (now := time.monotonic()) - self._looked_at < TOGETHER:
            return self._found
        self._looked_at = now
        files: dict[Path, tuple[tuple[int, ...], Mapping[str, Pem]]] = {}
        for path in sorted(self._folder.rglob("*")):
            if path.suffix not in _SUFFIXES or any(p.startswith(".") for p in path.relative_to(self._folder).parts):
                continue
            try:
                status = path.stat()
                stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
                known = self._files.get(path)
                if known is None or known[0] != stamp:
                    text = path.read_text("utf-8") if status.st_size <= LARGEST else ""
                    known = (stamp, dict(_secrets(text, self._namespace)))
                files[path] = known
            except (OSError, UnicodeDecodeError) as error:
                _log.warning("%s can't be read for secrets: %s", path, error)
        self._files = files
        found: dict[str, Pem] = {}
        for _, secrets in files.values():
            for name, pem in secrets.items():
                found.setdefault(name, pem)
        self._found = found
        return found

    def __repr__(self) -> str:
        return f"<Secrets of {self._namespace} in {self._folder or 'no folder'}>"


def _secrets(text: str, namespace: str) -> Iterator[tuple[str, Pem]]:
    """Those of this namespace, or of none. What is wrong in other objects is their readers' business."""
    for document in split(text):
        try:
            value = document.value()
        except InvalidYaml:
            continue
        if not isinstance(value, dict) or value.get("kind") != "Secret" or value.get("apiVersion") != "v1":
            continue
        metadata = value.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        if not isinstance(metadata, dict) or not isinstance(name, str):
            continue
        if metadata.get("namespace") in (None, "", namespace):
            yield name, pem_of(name, value)


def pem_of(name: str, value: Mapping[str, Any]) -> Pem:
    """What a Secret of Kubernetes holds."""
    plain, coded = value.get("stringData"), value.get("data")

    def read(names: tuple[str, ...]) -> bytes:
        for each in names:
            if isinstance(plain, dict) and isinstance(plain.get(each), str):
                return str(plain[each]).encode()
            if isinstance(coded, dict) and isinstance(coded.get(each), str):
                try:
                    return base64.b64decode("".join(coded[each].split()), validate=True)
                except (binascii.Error, ValueError):
                    _log.warning("Secret %s: %s is no base64", name, each)
        return b""

    return Pem(**{part: read(names) for part, names in _KEYS.items()})
