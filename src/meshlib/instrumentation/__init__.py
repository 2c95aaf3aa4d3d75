"""How does an application join the mesh without a line of its own? Its libraries are patched as they are imported.

`instrument()` in the process itself, or `meshctl run -- ...` around it, which has `autostart/sitecustomize.py` do so in
each Python process that the command starts. What is patched: how clients make their connections (outbound.py) and how
servers load their application (servers.py). A library that is never imported is never touched, nor loaded by us.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from meshlib.errors import SettingsError
from meshlib.instrumentation import outbound, rpc, servers
from meshlib.instrumentation.patches import Patches

if TYPE_CHECKING:
    from meshlib.mesh import Mesh

_PATCHES: dict[str, Callable[[ModuleType, Patches], None]] = {**outbound.PATCHES, **rpc.PATCHES, **servers.PATCHES}
LIBRARIES = tuple(sorted({name.partition(".")[0] for name in _PATCHES}))
"""What is put on the mesh, by the names of the packages."""
EXCLUDE = "MESHLIB_EXCLUDE"
_lock = threading.RLock()
_active: Patches | None = None


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: lets the others find a module of ours, and patches it once it has run."""

    def __init__(self, patches: Patches, excluded: frozenset[str]) -> None:
        self._patches, self._excluded = patches, excluded
        self._looking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES or name.partition(".")[0] in self._excluded:
            return None
        if getattr(self._looking, "name", "") == name:
            return None
        self._looking.name = name
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking.name = ""
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._patches.apply(_PATCHES[name], module)

        loader.exec_module = exec_module  # the loader is this module's own
        return spec


def excluded_by(names: Iterable[str]) -> frozenset[str]:
    """Raises SettingsError for a name of nothing that is put on the mesh."""
    excluded = frozenset(filter(None, (name.strip().lower() for name in names)))
    if unknown := sorted(excluded.difference(LIBRARIES)):
        raise SettingsError(f"{unknown[0]!r} can't be excluded; there are {', '.join(LIBRARIES)}")
    return excluded


def instrument(mesh: Mesh | None = None, *, exclude: Iterable[str] | None = None) -> None:
    """Put the calls of httpx, httpx2, requests, urllib3, aiohttp and grpc on the mesh, and the applications that
    gunicorn, uvicorn and werkzeug load, and gRPC's servers, behind its middleware, from now on. Twice is once.

    mesh: whose; default one with the environment's settings, made with the first call or application. exclude: packages
    that are left alone; default what MESHLIB_EXCLUDE names, as `grpc,requests`. Clients, servers and applications that
    exist already stay as they are. A setting that can't be used raises SettingsError, mostly there.
    """
    global _active
    with _lock:
        if _active is not None:
            return
        excluded = excluded_by(os.environ.get(EXCLUDE, "").split(",") if exclude is None else exclude)
        _active = patches = Patches(mesh)
        if "grpc" not in sys.modules:
            os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")  # see xds/stream.py
        sys.meta_path.insert(0, _WhenImported(patches, excluded))
        for name, patch in _PATCHES.items():
            if name.partition(".")[0] not in excluded and (module := sys.modules.get(name)) is not None:
                patches.apply(patch, module)


def uninstrument() -> None:
    """Undo `instrument()` for clients and applications made from now on; what was made meanwhile stays on the mesh."""
    global _active
    with _lock:
        if _active is None:
            return
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
        _active.undo()
        _active = None


__all__ = ["instrument", "uninstrument"]
