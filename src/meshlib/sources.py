"""Whose word does a process take? The setting `control_plane` -> a Source."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from meshlib.errors import SettingsError
from meshlib.identity.access import addresses_of
from meshlib.model import Node
from meshlib.settings import DNS, ISTIO, KUBERNETES, Settings, host_and_port, resolved

if TYPE_CHECKING:
    from meshlib.discovery import Source
    from meshlib.xds.stream import Connect


def source_of(settings: Settings, node: Node, connect: Callable[[str], Connect]) -> Source:
    """connect: how to reach the control plane at an address. Raises SettingsError for an address that can't be used."""
    control_plane = settings.control_plane
    if Path(control_plane).is_dir():
        from meshlib.discovery.file import FolderSource

        return FolderSource(Path(control_plane), node)
    if control_plane.startswith(DNS):
        return _dns_source(control_plane.removeprefix(DNS))
    if control_plane.startswith(KUBERNETES):
        where = control_plane.removeprefix(KUBERNETES)
        return _kubernetes_source(where, settings.namespace, settings.locality.zone)
    try:
        for each in addresses_of(control_plane):
            host_and_port(each)
    except ValueError:
        raise SettingsError(
            f"control plane {control_plane!r} is neither an existing folder nor host:port (or several, separated "
            f"by commas), {DNS} or {KUBERNETES}"
        ) from None
    from meshlib.discovery.xds import XdsSource

    return XdsSource(
        control_plane,
        node,
        cache_dir=_cache_dir(settings.cache_dir),
        istio=settings.dialect == ISTIO,
        connect=connect(control_plane),
    )


def _dns_source(server: str) -> Source:
    """Raises SettingsError."""
    try:
        address = resolved(*host_and_port(server)) if server else None
        from meshlib.discovery.dns import DnsSource
    except ValueError as error:
        raise SettingsError(f"control plane {DNS}{server!r}: {error}") from None
    except ImportError as error:
        raise SettingsError(
            f"control plane {DNS!r} needs the extra dns (pip install 'meshlib-proxyless[dns]'): {error}"
        ) from error
    return DnsSource(address)


def _kubernetes_source(context: str, namespace: str, zone: str) -> Source:
    """Raises SettingsError."""
    from meshlib.discovery.kubernetes import KubernetesSource
    from meshlib.kube.errors import InvalidSettings
    from meshlib.kube.settings import find_settings

    try:
        settings = find_settings(context=context)
    except InvalidSettings as error:
        raise SettingsError(f"control plane {KUBERNETES}{context!r}: {error}") from error
    return KubernetesSource(settings, "" if namespace == "default" else namespace, zone=zone)


def _cache_dir(setting: str) -> Path | None:
    if setting == "-":
        return None
    if setting:
        return Path(setting)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "meshlib"
