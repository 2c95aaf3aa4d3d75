"""Where is the control plane that runs on this machine? A small file of the user's says so while it runs.

`meshctl control-plane` (and so `meshctl demo`) writes it, so that a plain `meshctl apply` finds a control plane whose
ports are not the usual ones. The last one started wins.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec


class Running(msgspec.Struct, frozen=True, omit_defaults=True):
    """admin: `http://127.0.0.1:15014`. xds: `127.0.0.1:15010`. pid: of the control plane. ca: PEM of the roots that
    vouch for it, where it is asked by TLS."""

    admin: str
    xds: str
    pid: int
    ca: str = ""


def state_file() -> Path:
    """`$XDG_STATE_HOME/meshlib/control-plane.json`, on every platform."""
    home = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(home) if home else Path.home() / ".local" / "state"
    return folder / "meshlib" / "control-plane.json"


def announce(running: Running) -> None:
    """Write the file. A home that can't be written to is no reason not to run: then users pass --control-plane."""
    path = state_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written beside and renamed: a reader sees the old file or the new one. mkstemp makes it the user's only.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(running))
        Path(temporary).replace(path)


def withdraw(pid: int) -> None:
    """Remove the file, unless another control plane has written it since."""
    found = _read()
    if found is not None and found.pid == pid:
        with contextlib.suppress(OSError):
            state_file().unlink()


def find() -> Running | None:
    """The control plane that announced itself and is still alive."""
    found = _read()
    if found is None:
        return None
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, and another user's
    return found


def _read() -> Running | None:
    try:
        return msgspec.json.decode(state_file().read_bytes(), type=Running)
    except (OSError, msgspec.DecodeError, RuntimeError):  # RuntimeError: there is no home
        return None
