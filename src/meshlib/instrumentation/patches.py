"""What did instrument() change, for which Mesh, and how is it put back?"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from meshlib.state import forks

if TYPE_CHECKING:
    from meshlib.mesh import Mesh


def is_ours(depth: int) -> bool:
    """Whether the function so many calls above our caller is a part of meshlib: what the mesh itself needs to work
    must not wait for the mesh."""
    name = str(sys._getframe(depth + 1).f_globals.get("__name__", ""))
    return name == "meshlib" or name.startswith("meshlib.")


class Patches:
    """The replaced attributes. `mesh()` is made at first use, so that patching starts and loads nothing."""

    def __init__(self, mesh: Mesh | None) -> None:
        self._mesh = mesh
        self._lock = forks.lock()
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def mesh(self) -> Mesh:
        if self._mesh is None:
            from meshlib.mesh import connect

            with self._lock:
                if self._mesh is None:
                    self._mesh = connect()
        return self._mesh

    def apply(self, patch: Callable[[ModuleType, Patches], None], module: ModuleType) -> None:
        patch(module, self)

    def around(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Have `owner.name(...)` call `wrapper(original, ...)` instead."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def patched(*args: Any, **options: Any) -> Any:
            return wrapper(original, *args, **options)

        setattr(owner, name, patched)
        self._replaced.append((owner, name, original, patched))

    def undo(self) -> None:
        """Put everything back, but for what somebody else has patched since: theirs may still call ours."""
        for owner, name, original, patched in reversed(self._replaced):
            if getattr(owner, name) is patched:
                setattr(owner, name, original)
        self._replaced.clear()
