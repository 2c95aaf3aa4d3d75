"""Which pages are there, and what stands in them? Blocks of code and links, with their line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = tuple(sorted([*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *(ROOT / "docs").rglob("*.md")]))
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """One `$ ` line of a console block, and the lines printed below it."""

    page: Path
    line: int
    text: str
    printed: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} {self.text}"


def blocks(language: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            if match[1] == language:
                yield Block(page, text.count("\n", 0, match.start()) + 1, language, match[2])


def commands() -> Iterator[Command]:
    for block in blocks("console"):
        number, text, printed = 0, "", ""
        for offset, line in enumerate(block.text.splitlines(keepends=True), 1):
            if line.startswith("$ "):
                if text:
                    yield Command(block.page, number, text, printed)
                number, text, printed = block.line + offset, line[2:].strip(), ""
            else:
                printed += line
        assert text, f"{block.id}: a console block without a command"
        yield Command(block.page, number, text, printed)


def without_code(page: Path) -> str:
    """The page's text, code left out: what looks like a link there is none."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of its headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}
