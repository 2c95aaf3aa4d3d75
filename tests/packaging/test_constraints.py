"""Do the versions that `make test` installs lie within what pyproject.toml allows?"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line for line in (ROOT / "constraints" / "test.txt").read_text().splitlines() if not line.startswith("#")]


def test_every_line_is_one_version_of_a_package() -> None:
    """No path, no address: nothing of the machine that it was written on."""
    assert LINES
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.!+]+", line)] == []


def test_the_versions_are_allowed_by_the_project() -> None:
    """Else pip refuses to install: `make lock`, in an environment that was made anew, writes others down."""
    held = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
    assert len(held) == len(LINES)
    wanted = [*PROJECT["project"]["dependencies"]]
    for group in (*PROJECT["project"]["optional-dependencies"].values(), *PROJECT["dependency-groups"].values()):
        wanted += group
    for requirement in map(Requirement, wanted):
        version = held.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version, prereleases=True), requirement
