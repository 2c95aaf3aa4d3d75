"""The reference pages name what there is, all of it and nothing else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

import meshlib
from meshlib.cli.app import app
from meshlib.cli.connection import SHARED
from meshlib.settings import Settings

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_every_command_and_option_of_meshctl_is_named() -> None:
    """And no option that is gone. Those of all commands that ask stand above the table."""
    page = (REFERENCE / "meshctl.md").read_text()
    shared = {f"--{name}" for name in SHARED}
    assert all(f"`{option}" in page for option in shared)
    rows = re.findall(r"^\| `meshctl ([a-z-]+)[^|]*\|[^|]*\|([^|]*)\|$", page, re.M)
    written = {name: set(re.findall(r"--[a-z-]+", options)) for name, options in rows}
    commands = get_command(app).commands  # type: ignore[attr-defined]
    there = {
        name: {
            max(parameter.opts, key=len)
            for parameter in command.params
            if parameter.param_type_name == "option" and "--help" not in parameter.opts
        }
        for name, command in commands.items()
        if not command.hidden
    }
    there = {name: options - shared if shared <= options else options for name, options in there.items()}
    assert written == there


def test_every_setting_is_named() -> None:
    """MESHLIB_<FIELD> for each field of Settings."""
    written = set(re.findall(r"^\| `(MESHLIB_[A-Z_]+)`", (REFERENCE / "settings.md").read_text(), re.M))
    assert written == {f"MESHLIB_{field.upper()}" for field in Settings.__dataclass_fields__}


def test_every_public_name_of_the_package_is_in_the_reference() -> None:
    """By itself, or as one of the errors, whose module is shown whole; and each public method of Mesh that is meant for
    users."""
    page = (REFERENCE / "api.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)$", page, re.M)
    for name in sorted(set(meshlib.__all__) - {"__version__"}):
        home = meshlib._HOMES[name]
        assert home in shown or f"{home}.{name}" in shown, name
    for path in shown:
        found: Any = meshlib
        for part in path.split(".")[1:]:
            found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")
    members = re.findall(r"^        - (\w+)$", page.partition("::: meshlib.settings.Settings")[0], re.M)
    assert members and all(
        callable(getattr(meshlib.Mesh, name)) or name in ("credentials", "listening") for name in members
    )
