"""What did the control plane last say? One file for each kind of process, for starts while nobody answers.

A memory and no more: what can't be read or written is logged and otherwise ignored. Processes that are alike (workers,
replicas on one machine) share a file, and the last writer's stays. Nothing in it is secret: certificates are named in
the mesh's configuration, and not contained.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

import msgspec

from meshlib.model import Node
from meshlib.state import forks

_log = logging.getLogger("meshlib.discovery")

_MAGIC = b"meshlib configuration 1\n"
_DIGEST = hashlib.sha256


class Memory(msgspec.Struct, frozen=True):
    """version: the Snapshot's. wanted: authorities, the one asked for first in front. resources: by type, name and
    bytes as they came; None where it is known that there is none."""

    version: str = ""
    wanted: tuple[str, ...] = ()
    resources: dict[str, dict[str, bytes | None]] = {}


class DiskCache:
    """The file of processes like `node` that ask `target`, in `folder`, which is made when first needed."""

    def __init__(self, folder: Path, target: str, node: Node) -> None:
        workload = node.workload
        # Whatever a control plane's answer depends on; another process with the same gets the same configuration.
        # Not the node's id, address and port: those change with every start.
        alike = (
            target,
            node.kind,
            node.cluster_id,
            node.trust_domain,
            workload.name,
            workload.namespace,
            workload.service,
            workload.service_account,
            workload.labels,
            workload.locality,
        )
        key = hashlib.sha256(repr(alike).encode(errors="backslashreplace")).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{workload.name}.{workload.namespace}")[:80].lstrip(".")
        self.path = folder / f"{name}-{key}.xds"
        self._last = b""
        self._is_failing = False

    def load(self) -> Memory | None:
        """None where nothing is kept, or nothing that can be read."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the last good configuration can't be read, starting without: %s", error)
            return None
        size = len(_MAGIC) + _DIGEST().digest_size
        digest, payload = data[len(_MAGIC) : size], data[size:]
        try:
            if not data.startswith(_MAGIC) or _DIGEST(payload).digest() != digest:
                raise ValueError("the file is damaged, or another version's")
            with forks.whole:
                memory = msgspec.msgpack.decode(payload, type=Memory)
        except (ValueError, msgspec.MsgspecError) as error:
            _log.warning("the last good configuration in %s is ignored: %s", self.path, error)
            return None
        self._last = data
        return memory

    def save(self, memory: Memory) -> None:
        """Replace the file as a whole, unless it says so already. A reader sees the old one or the new one."""
        with forks.whole:
            payload = msgspec.msgpack.encode(memory)
        data = _MAGIC + _DIGEST(payload).digest() + payload
        if data == self._last:
            return
        try:
            self._replace(data)
        except OSError as error:
            if not self._is_failing:
                _log.warning("the configuration can't be kept for the next start: %s", error)
            self._is_failing = True
        else:
            self._last = data
            self._is_failing = False

    def _replace(self, data: bytes) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not synced to the disk: a file that a power failure tore fails its digest, and costs only the memory.
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".new")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def __repr__(self) -> str:
        return f"<DiskCache {self.path}>"
