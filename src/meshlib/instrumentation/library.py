"""How does a pod whose image knows no meshlib get it? An init container hands over a library; autostart finds it there.

The library is a folder that scripts/pod_library.py makes for the image: `autostart`, packages for every Python (`any`,
`abi3`), and those for one Python each, by the name that this gives to its extension modules
(`cpython-312-x86_64-linux-gnu`: version, machine and C library). autostart/sitecustomize.py puts its packages behind
the application's own.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

DISTRIBUTION = "meshlib-proxyless"
IMAGE_FOLDER = "/opt/meshlib-library"
"""Where our image keeps it."""
_LEAST = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9][0-9.]*)\s*$")


def too_old(distribution: str = DISTRIBUTION) -> Iterator[str]:
    """What the application brings in versions that meshlib can't use: its own packages come first."""
    for requirement in requires(distribution) or ():
        if (least := _LEAST.match(requirement)) is None:  # of an extra, or of some Pythons only
            continue
        found = _version(least[1])
        if not found:
            yield f"{least[1]} is missing, or does not say its version"
        elif _numbers(found) < _numbers(least[2]):
            yield f"{least[1]} {found} of the application is older than {least[2]}"


def _version(distribution: str) -> str:
    """ "" of one that is not there, or whose metadata are broken (None, and KeyError from Python 3.14 on)."""
    try:
        return version(distribution) or ""
    except (PackageNotFoundError, KeyError):
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release: 6, 6.0 and 6.0.0 are one."""
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(each) for each in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def main(words: list[str]) -> int:
    """What the init container does. FOLDER [LIBRARY TARGET]: the mesh's root (PEM, in MESHLIB_ROOT) is written to
    FOLDER, the library's content to TARGET. The exit status."""
    if len(words) > 1 and not (Path(words[1]) / "autostart").is_dir():
        print(f"meshlib-init: {words[1]} is no library: build the image by meshlib's Containerfile", file=sys.stderr)
        return 1
    try:
        (Path(words[0]) / "root-cert.pem").write_text(os.environ["MESHLIB_ROOT"])
        if len(words) > 1:
            _hand_over(Path(words[1]), Path(words[2]))
    except (OSError, shutil.Error) as error:
        print(f"meshlib-init: {error}", file=sys.stderr)
        return 1
    return 0


def _hand_over(library: Path, target: Path) -> None:
    """Each folder of the library, and not the library as one: mode and times of the target, a volume that a kubelet has
    made, are root's alone to change."""
    for each in library.iterdir():
        if each.is_dir():
            shutil.copytree(each, target / each.name, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(each, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
