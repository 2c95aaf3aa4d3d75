"""How does an application join the mesh without a line of its own? Its libraries are patched as they are imported.

`instrument()` in the process itself, or `meshctl run -- ...` around it, which has `autostart/sitecustomize.py` do so in
each Python process that the command starts. What is patched: how clients make their connections (outbound.py) and how
servers load their application (servers.py). A library that is never imported is never touched, nor loaded by us.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from meshlib.instrumentation import outbound, servers
from meshlib.instrumentation.patches import Patches

if TYPE_CHECKING:
    from meshlib.mesh import Mesh

_PATCHES: dict[str, Callable[[ModuleType, Patches], None]] = {**outbound.PATCHES, **servers.PATCHES}
_lock = threading.RLock()
_active: Patches | None = None


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: lets the others find a module of ours, and patches it once it has run."""

    def __init__(self, patches: Patches) -> None:
        self._patches = patches
        self._looking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES or getattr(self._looking, "name", "") == name:
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


def instrument(mesh: Mesh | None = None) -> None:
    """Put the calls of httpx, httpx2, requests, urllib3 and aiohttp on the mesh, and the applications that gunicorn,
    uvicorn and werkzeug load behind its middleware, from now on. Twice is once.

    mesh: whose; default one with the environment's settings, made with the first call or application. Clients and
    applications that exist already stay as they are. A setting that can't be used raises SettingsError there.
    """
    global _active
    with _lock:
        if _active is not None:
            return
        _active = patches = Patches(mesh)
        sys.meta_path.insert(0, _WhenImported(patches))
        for name, patch in _PATCHES.items():
            if (module := sys.modules.get(name)) is not None:
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
