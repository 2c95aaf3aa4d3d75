"""How is an application run on the mesh, as it is? meshctl run: its command, with the mesh switched on in Python."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

import meshlib
from meshlib.cli.failure import CommandFailed
from meshlib.errors import SettingsError
from meshlib.instrumentation import EXCLUDE, excluded_by

AUTOSTART = Path(meshlib.__file__).parent / "instrumentation" / "autostart"


def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="The command, or -m MODULE, and its words.")],
    control_plane: Annotated[
        str,
        typer.Option(
            envvar="MESHLIB_CONTROL_PLANE",
            metavar="HOST:PORT|FOLDER",
            help="The control plane's xDS address, or a folder of YAML.",
        ),
    ] = "",
    service: Annotated[
        str, typer.Option(envvar="MESHLIB_SERVICE", help="The service that this process is of, if it serves one.")
    ] = "",
    exclude: Annotated[
        str, typer.Option(envvar=EXCLUDE, metavar="PACKAGES", help="Left alone, as grpc,requests.")
    ] = "",
) -> None:
    """Run a Python application on the mesh, unchanged: meshctl run -- gunicorn app:app

    The command takes the place of this process: signals and its exit code are its own.
    """
    from meshlib.settings import Settings

    given = {"MESHLIB_CONTROL_PLANE": control_plane, "MESHLIB_SERVICE": service, EXCLUDE: exclude}
    environment = {**os.environ, **{name: value for name, value in given.items() if value}}
    if not control_plane:
        raise CommandFailed("no control plane: set MESHLIB_CONTROL_PLANE or --control-plane to host:port or a folder")
    try:
        Settings.from_environment(environment)
        excluded_by(exclude.split(","))
    except SettingsError as error:
        raise CommandFailed(str(error)) from None
    words = [sys.executable, *command] if command[0] == "-m" else command
    program = shutil.which(words[0])
    if program is None:
        raise CommandFailed(
            f"{words[0]}: there is no such command here: give the program with its path, or see that it is on PATH"
        )
    paths = [str(AUTOSTART), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    sys.stdout.flush()
    os.execve(program, words, environment)
