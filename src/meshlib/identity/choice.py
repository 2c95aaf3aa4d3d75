"""Who vouches for this process? The setting `identity` -> a CredentialsSource."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meshlib.errors import SettingsError
from meshlib.identity.access import Access
from meshlib.identity.credentials import Credentials, CredentialsSource


def access_to(
    target: str,
    ca_roots: str,
    token_file: str,
    credentials: Callable[[], Credentials | None],
    headers: tuple[tuple[str, str], ...] = (),
) -> Access:
    """The way to a control plane or CA, by the settings of these names. headers: further metadata of each call."""
    roots, token = (Path(each) if each else None for each in (ca_roots, token_file))
    return Access(target, roots, token, credentials, headers=headers)


def credentials_source(identity: str, access: Callable[[str], Access], control_plane: str) -> CredentialsSource:
    """identity: `control-plane`, `ca:host:port`, `files:FOLDER` or `spiffe` (`spiffe:unix:///PATH`).

    Raises SettingsError where the library is missing.
    """
    kind, _, where = identity.partition(":")
    if kind == "files":
        from meshlib.identity.files import FilesSource

        return FilesSource(Path(where))
    if kind == "spiffe":
        try:
            from meshlib.identity.workload_api import WorkloadApiSource
        except ImportError as error:
            raise SettingsError(
                f"identity {identity!r} needs the extra spiffe (pip install 'meshlib-proxyless[spiffe]'): {error}"
            ) from error
        return WorkloadApiSource(where)
    from meshlib.identity.ca_client import CaSource

    return CaSource(access(where or control_plane))
