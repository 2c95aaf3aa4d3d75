"""meshlib: a service mesh without sidecars, for Python.

The public names. Everything loads at first use: `import meshlib` needs no client library and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshlib.version import __version__

if TYPE_CHECKING:
    from meshlib.errors import ConfigurationError, MeshClosed, MeshError, SettingsError
    from meshlib.mesh import Mesh, Settings, connect

_HOMES = {
    "ConfigurationError": "meshlib.errors",
    "Mesh": "meshlib.mesh",
    "MeshClosed": "meshlib.errors",
    "MeshError": "meshlib.errors",
    "Settings": "meshlib.mesh",
    "SettingsError": "meshlib.errors",
    "connect": "meshlib.mesh",
}

__all__ = [
    "ConfigurationError",
    "Mesh",
    "MeshClosed",
    "MeshError",
    "Settings",
    "SettingsError",
    "__version__",
    "connect",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'meshlib' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
