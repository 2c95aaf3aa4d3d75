"""Which texts does `-f` name? Files, the YAML files of folders, standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from meshlib.cli.failure import CommandFailed

SUFFIXES = frozenset((".yaml", ".yml", ".json"))


class Text(NamedTuple):
    """source: the file's full path, as the control plane remembers it; `stdin`."""

    source: str
    text: str


def read(names: Sequence[str], *, recursive: bool = False) -> Iterator[Text]:
    """The texts in the order given, a folder's by name. Raises CommandFailed for what can't be read."""
    for name in names:
        if name == "-":
            yield Text("stdin", sys.stdin.read())
            continue
        path = Path(name)
        if not path.exists():
            raise CommandFailed(
                f"the path {name!r} does not exist: give a YAML file, a folder of them, or - for the standard input"
            )
        if path.is_dir():
            found = sorted(
                file
                for file in (path.rglob("*") if recursive else path.iterdir())
                if file.suffix in SUFFIXES and file.is_file()
            )
            if not found:
                raise CommandFailed(f"no .yaml, .yml or .json file in the folder {name!r}")
            for file in found:
                yield _read(file)
        else:
            yield _read(path)


def shown(source: str) -> str:
    """`/home/me/mesh/reviews.yaml:12` -> `mesh/reviews.yaml:12` where it lies below the current folder."""
    try:
        return str(Path(source).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return source


def _read(path: Path) -> Text:
    try:
        return Text(str(path.resolve()), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"{path} can't be read: {error}") from None
