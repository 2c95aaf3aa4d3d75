"""meshlib: a service mesh without sidecars, for Python.

The public names. Everything loads at first use: `import meshlib` needs no client library and starts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshlib.version import __version__

if TYPE_CHECKING:
    from meshlib.errors import (
        AnsweredByRoute,
        CircuitOpen,
        ConfigurationError,
        FaultInjected,
        MeshClosed,
        MeshError,
        NoCluster,
        NoHealthyEndpoint,
        NoRoute,
        NotConfigured,
        NotInRegistry,
        Overflow,
        RateLimited,
        RateLimitUnanswered,
        RequestRefused,
        SettingsError,
        UpstreamConnectionFailure,
        UpstreamFailure,
        UpstreamReset,
        UpstreamTimeout,
    )
    from meshlib.instrumentation import instrument, uninstrument
    from meshlib.mesh import Mesh, connect
    from meshlib.settings import Settings

_HOMES = {
    "AnsweredByRoute": "meshlib.errors",
    "CircuitOpen": "meshlib.errors",
    "ConfigurationError": "meshlib.errors",
    "FaultInjected": "meshlib.errors",
    "Mesh": "meshlib.mesh",
    "MeshClosed": "meshlib.errors",
    "MeshError": "meshlib.errors",
    "NoCluster": "meshlib.errors",
    "NoHealthyEndpoint": "meshlib.errors",
    "NoRoute": "meshlib.errors",
    "NotConfigured": "meshlib.errors",
    "NotInRegistry": "meshlib.errors",
    "Overflow": "meshlib.errors",
    "RateLimited": "meshlib.errors",
    "RateLimitUnanswered": "meshlib.errors",
    "RequestRefused": "meshlib.errors",
    "Settings": "meshlib.settings",
    "SettingsError": "meshlib.errors",
    "UpstreamConnectionFailure": "meshlib.errors",
    "UpstreamFailure": "meshlib.errors",
    "UpstreamReset": "meshlib.errors",
    "UpstreamTimeout": "meshlib.errors",
    "connect": "meshlib.mesh",
    "instrument": "meshlib.instrumentation",
    "uninstrument": "meshlib.instrumentation",
}

__all__ = [
    "AnsweredByRoute",
    "CircuitOpen",
    "ConfigurationError",
    "FaultInjected",
    "Mesh",
    "MeshClosed",
    "MeshError",
    "NoCluster",
    "NoHealthyEndpoint",
    "NoRoute",
    "NotConfigured",
    "NotInRegistry",
    "Overflow",
    "RateLimitUnanswered",
    "RateLimited",
    "RequestRefused",
    "Settings",
    "SettingsError",
    "UpstreamConnectionFailure",
    "UpstreamFailure",
    "UpstreamReset",
    "UpstreamTimeout",
    "__version__",
    "connect",
    "instrument",
    "uninstrument",
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
