"""Which cluster does a person mean? The kubeconfig's, as kubectl has it, or the one that this pod runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlib.cli.failure import CommandFailed

if TYPE_CHECKING:
    from meshlib.kube.settings import KubeSettings


def cluster_of(context: str = "") -> KubeSettings:
    """Raises CommandFailed."""
    # Here, since other commands need none of it and should answer at once.
    from meshlib.kube.errors import InvalidSettings
    from meshlib.kube.settings import find_settings

    try:
        return find_settings(context=context)
    except InvalidSettings as error:
        raise CommandFailed(str(error)) from None
