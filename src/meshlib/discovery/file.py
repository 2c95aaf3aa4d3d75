"""What does a folder of YAML say? The feed of a process without a control plane, which watches the files itself.

The same YAML, the same translation, the same Snapshot as from a control plane. Only nobody registers workloads: who
serves what, the files say (ServiceEntry, Endpoints, EndpointSlice, Pod).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from meshlib.errors import ConfigurationError
from meshlib.istio.folder import Folder
from meshlib.istio.problems import ConfigurationWarning
from meshlib.istio.translate import translate
from meshlib.model import Node, Snapshot

_log = logging.getLogger("meshlib.discovery")


class FolderSource:
    """Feed of one process from a folder of YAML. A Source. An edit is in force within a second.

    A broken edit leaves what was in force, and each problem is logged once, with file, line, object and field.
    """

    def __init__(self, folder: Path, node: Node) -> None:
        self._folder = folder
        self._node = node
        self._stop = threading.Event()
        self._told: frozenset[str] = frozenset()

    def run(self, publish: Callable[[Snapshot], None]) -> None:
        last: Snapshot | None = None
        for number, contents in enumerate(Folder([self._folder]).watch(self._stop), start=1):
            try:
                translation = translate(contents.objects, (), self._node)
            except Exception:
                # A defect of ours; what was in force stays so, and the next edit gets its chance.
                _log.exception("%s can't be used", self._folder)
                continue
            self._tell((*contents.problems, *contents.warnings, *translation.problems))
            snapshot = replace(translation.snapshot, version=f"{self._folder.name}-{number}")
            if last is None or not snapshot.same_content(last):
                last = snapshot
                publish(snapshot)

    def want(self, authority: str) -> None:
        """Nothing to do: every Snapshot is complete."""

    def stop(self) -> None:
        self._stop.set()

    def _tell(self, problems: Iterable[ConfigurationError]) -> None:
        """Each once, and again when it comes back after it was mended."""
        found = {str(problem): problem for problem in problems}
        for text, problem in found.items():
            if text not in self._told:
                level = logging.INFO if isinstance(problem, ConfigurationWarning) else logging.WARNING
                _log.log(level, "%s", text)
        self._told = frozenset(found)

    def __repr__(self) -> str:
        return f"<FolderSource {self._folder}>"
