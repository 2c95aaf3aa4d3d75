"""How do other programs get this process's certificate? A folder of files that is replaced at once, as Kubernetes
replaces a mounted Secret.

`tls.crt`, `tls.key` and `ca.crt` are links through `..data`, a link to the present generation: who reads them in a row
never has a key beside another's certificate for longer than it takes to swap one link, and a watch of the folder sees
that swap.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path

from meshlib.identity.credentials import Credentials
from meshlib.identity.files import CERTIFICATE, KEY, ROOTS
from meshlib.identity.pem import BadCredentials, credentials_of

_CURRENT = "..data"


def write_credentials(folder: Path, credentials: Credentials) -> None:
    """Makes the folder (0700) where it is missing; files are 0600. One writer at a time. Raises OSError, also for a
    folder in which others may put other files in the place of these.

    ca.crt holds the roots of the own trust domain alone: whoever reads one file lets each root vouch for everybody.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if mode := stat.S_IMODE(folder.stat().st_mode) & 0o022:
        raise OSError(errno.EPERM, f"{folder} may be written by others ({mode:03o}): chmod go-w it first")
    before = _current(folder)
    generation = Path(tempfile.mkdtemp(prefix="..", dir=folder))  # 0700
    for name, content in (
        (CERTIFICATE, credentials.certificate_chain),
        (KEY, credentials.private_key),
        (ROOTS, dict(credentials.trust_bundles)[credentials.identity.trust_domain]),
    ):
        with os.fdopen(os.open(generation / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    _point(folder / _CURRENT, generation.name)
    for name in (CERTIFICATE, KEY, ROOTS):
        if not (folder / name).is_symlink():
            _point(folder / name, f"{_CURRENT}/{name}")
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def read_credentials(folder: Path, now: float) -> Credentials | None:
    """What is there and still good; None where there is nothing. now: seconds since 1970."""
    try:
        chain, key, roots = ((folder / name).read_bytes() for name in (CERTIFICATE, KEY, ROOTS))
        found = credentials_of(chain, key, roots)
    except (OSError, BadCredentials):
        return None
    return None if found.has_expired(now) else found


def _current(folder: Path) -> Path | None:
    with contextlib.suppress(OSError):
        found = folder / (folder / _CURRENT).readlink()
        # Only what this function made is removed.
        return found if found.parent == folder and found.name.startswith("..") and found.name != _CURRENT else None
    return None


def _point(link: Path, target: str) -> None:
    """A link made beside and renamed: it is there, old or new, at every moment."""
    draft = link.with_name(f"{link.name}.new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(link)
