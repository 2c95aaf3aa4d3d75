"""Which values does a YAML text hold, and on which lines? One document at a time, so a broken one hides no other.

Values are built from the parser's events, not by PyYAML's constructor, for four reasons: a repeated key is an error
here (YAML forbids it, PyYAML keeps the last), lines are known, nesting and aliases are bounded (PyYAML's C composer
overflows the stack on deep input), and scalars mean what they mean to Kubernetes: dates stay text.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

_START = re.compile(r"^---(?=[ \t\n]|\Z)", re.MULTILINE)
_CONTENT = re.compile(r"^[ \t]*[^\s#%]", re.MULTILINE)
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")
_PREFIXED_INT = re.compile(r"[-+]?0(x[0-9a-fA-F_]+|o?[0-7_]+|b[01_]+)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?\Z")
_BOOLS = {
    spelling: value
    for words, value in ((("yes", "true", "on"), True), (("no", "false", "off"), False))
    for word in words
    for spelling in (word, word.capitalize(), word.upper())
}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TAG = "tag:yaml.org,2002:"

MAX_DEPTH = 100
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
MAX_VALUES = 1_000_000
"""Aliases count as often as they are used, so a few lines can't stand for billions of values."""


class InvalidYaml(ValueError):
    """line: counted from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


@dataclass(slots=True)
class Document:
    """One document's text and the number (from 0) of its first line in the file."""

    text: str
    first_line: int
    _lines: dict[Path, int] | None = field(default=None, repr=False, compare=False)

    def value(self) -> Any:
        """Mappings, sequences, strings, numbers, booleans, None. Raises InvalidYaml, and no other exception."""
        return _Builder(self).build()

    def partial(self) -> dict[str, Any]:
        """Of a mapping that is no YAML: the entries that were whole before the place where it breaks, those of `spec`
        one by one. An entry is whole once another has begun; one that stands there twice is not."""
        builder = _Builder(self)
        with contextlib.suppress(InvalidYaml):
            builder.build()
        return builder.so_far()

    def line(self, path: Path = ()) -> int:
        """The line of what `path` names, or of its nearest parent that is there."""
        if self._lines is None:
            if not path:
                return self.first_line + next(_places(self.text), ((), 0))[1] + 1
            self._lines = {}
            for place, line in _places(self.text):
                self._lines.setdefault(place, line)
        while path and path not in self._lines:
            path = path[:-1]
        return self.first_line + self._lines.get(path, 0) + 1


def split(text: str) -> Iterator[Document]:
    """The documents of a text: `---` in the first column starts one wherever it stands."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    starts = [0, *(match.start() for match in _START.finditer(text) if match.start())]
    line = 0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        body = part[3:] if part.startswith("---") else part
        if _CONTENT.search(body):
            yield Document(part, line)
        line += part.count("\n")


class _Frame:
    """A sequence or mapping that is being read."""

    __slots__ = ("anchor", "depth", "is_merge", "key", "merges", "size", "value")

    def __init__(self, value: dict[str, Any] | list[Any], anchor: str | None) -> None:
        self.value, self.anchor = value, anchor
        self.key: str | None = None
        self.merges: list[dict[str, Any]] = []
        self.is_merge = False
        self.size = 1
        self.depth = 1


class _Builder:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int, int]] = {}
        self._documents: list[Any] = []

    def build(self) -> Any:
        try:
            for event in yaml.parse(self._document.text, Loader=yaml.CSafeLoader):
                self._take(event)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line if mark else 0
            if "nesting depth" in (error.problem or ""):  # libyaml has a bound of its own, which may be reached first
                raise InvalidYaml(self._document.first_line + line + 1, _TOO_DEEP) from error
            raise InvalidYaml(self._document.first_line + line + 1, _sentence(error)) from error
        except (yaml.YAMLError, UnicodeError) as error:
            first = self._document.first_line + 1
            raise InvalidYaml(first, f"not YAML: {str(error).splitlines()[0]}") from error
        return self._documents[0] if self._documents else None

    def so_far(self) -> dict[str, Any]:
        found = _whole(self._stack[0]) if self._stack else {}
        if len(self._stack) > 1 and self._stack[0].key == "spec":
            found["spec"] = _whole(self._stack[1])
        return found

    def _take(self, event: Any) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._add(_scalar(event, self._wrong), event, event.anchor, 1, 0)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._bound_depth(event, 1)
            if event.tag not in (None, "!", f"{_TAG}map", f"{_TAG}seq"):
                raise self._wrong(event, f"the tag {event.tag} has no meaning here")
            self._stack.append(_Frame({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            frame = self._stack.pop()
            if isinstance(frame.value, dict):
                _merge(frame)
            self._add(frame.value, event, frame.anchor, frame.size, frame.depth)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._wrong(event, f"the alias *{event.anchor} stands before, or inside, what it names")
            value, size, depth = self._anchors[event.anchor]
            self._bound_depth(event, depth)
            self._add(value, event, None, size, depth)

    def _bound_depth(self, event: Any, more: int) -> None:
        """Aliases count with what they stand for: whoever walks a value by recursion walks MAX_DEPTH levels at most."""
        if len(self._stack) + more > MAX_DEPTH:
            raise self._wrong(event, _TOO_DEEP)

    def _add(self, value: Any, event: Any, anchor: str | None, size: int, depth: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (value, size, depth)
        if not self._stack:
            if self._documents:
                raise self._wrong(event, "a second document must begin with ---")
            self._documents.append(value)
            return
        frame = self._stack[-1]
        frame.size += size
        frame.depth = max(frame.depth, depth + 1)
        if frame.size > MAX_VALUES:
            raise self._wrong(event, f"more than {MAX_VALUES} values")
        if isinstance(frame.value, list):
            frame.value.append(value)
        elif frame.key is None:
            frame.key = self._key(frame, value, event)
        else:
            if frame.is_merge:
                merged = value if isinstance(value, list) else [value]
                if not all(isinstance(each, dict) for each in merged):
                    raise self._wrong(event, "<< must name a mapping")
                frame.merges.extend(merged)
            else:
                frame.value[frame.key] = value
            frame.key = None

    def _key(self, frame: _Frame, value: Any, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise self._wrong(event, "a key must be a word")
        key = str(event.value)
        frame.is_merge = key == "<<" and event.implicit[0]
        if isinstance(frame.value, dict) and key in frame.value:
            del frame.value[key]  # nobody can say which of the two is meant
            frame.key = key
            raise self._wrong(event, f"the key {key!r} stands here twice")
        return key

    def _wrong(self, event: Any, reason: str) -> InvalidYaml:
        return InvalidYaml(self._document.first_line + _mark_line(event) + 1, reason)


def _whole(frame: _Frame) -> dict[str, Any]:
    if not isinstance(frame.value, dict):
        return {}
    entries = list(frame.value.items())
    return dict(entries if frame.key is not None else entries[:-1])


def _merge(frame: _Frame) -> None:
    assert isinstance(frame.value, dict)
    for merged in frame.merges:
        for key, value in merged.items():
            frame.value.setdefault(key, value)


def _scalar(event: Any, wrong: Any) -> Any:
    text: str = event.value
    tag = event.tag
    if tag in (None, "!"):
        # implicit[0]: a plain scalar, whose meaning its spelling decides; quoted and block scalars are text.
        return _plain(text) if tag is None and event.implicit[0] else text
    if tag == f"{_TAG}str":
        return text
    if tag in {f"{_TAG}int", f"{_TAG}float", f"{_TAG}bool", f"{_TAG}null"}:
        return _plain(text)
    raise wrong(event, f"the tag {tag} has no meaning here")


def _plain(text: str) -> Any:
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if not text[0].isdecimal() and text[0] not in "+-.":
        return text
    # Python refuses to convert thousands of digits at once; so long a number is text, which no field accepts for one.
    if len(text) > 300:
        return text
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _PREFIXED_INT.match(text):
        digits = text.replace("_", "")
        octal = digits.lstrip("+-")[1:].isdecimal()
        try:
            return int(digits, 8 if octal else 0)
        except ValueError:
            return text
    if _FLOAT.match(text):
        try:
            number = float(text.replace("_", ""))
        except ValueError:
            return text
        return number if math.isfinite(number) else text
    return text


def is_text(text: str) -> bool:
    """Whether YAML takes it for text without quotes."""
    return isinstance(_plain(text), str)


def _sentence(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(str(part) for part in (error.problem, error.context) if part)
    if "cannot start any token" in problem or "\\t" in problem:
        problem += " (a tab can't indent YAML)"
    return f"not YAML: {problem}"


def _places(text: str) -> Iterator[tuple[Path, int]]:
    """Where each value stands: an entry of a mapping at its key. Ends where the text is no YAML any more."""
    here: Path = ()
    # What comes next in each open collection: the index, the key, or None where a key comes.
    nexts: list[Any] = []
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                nexts.pop()
                here = here[: len(nexts) - 1] if nexts else ()
            elif not isinstance(event, yaml.NodeEvent):
                continue
            elif nexts and nexts[-1] is None:
                nexts[-1] = key = str(getattr(event, "value", ""))
                yield (*here, key), _mark_line(event)
                if not isinstance(event, yaml.CollectionStartEvent):
                    continue
            elif not nexts or isinstance(nexts[-1], int):
                yield (*here, *nexts[-1:]), _mark_line(event)
            if isinstance(event, yaml.CollectionStartEvent):
                here = (*here, *nexts[-1:])
                nexts.append(None if isinstance(event, yaml.MappingStartEvent) else 0)
            elif nexts:
                nexts[-1] = nexts[-1] + 1 if isinstance(nexts[-1], int) else None
    except (yaml.YAMLError, UnicodeError):
        return


def _mark_line(event: Any) -> int:
    return int(event.start_mark.line)
