"""How do the rules for calls that come in travel? Inbound and Access <-> JSON, in a note of a Listener's metadata.

The fields of each value by their names, conditions with their kind under `is`. What has its default is left out, so a
reader of an earlier version understands all that it can enforce, and refuses the rest: here nothing is passed over.
A rule of which a part is missing would let in more than was meant.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import math
import re
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar, cast

from meshlib.model import Access, AddressIs, Condition, Inbound, PathTemplate, Quota, RateLimit, Reporting, StringMatch
from meshlib.xds import fields as checks
from meshlib.xds import notes
from meshlib.xds.fields import Wrong

_T = TypeVar("_T", Access, Inbound, Reporting)
_CONDITIONS = {kind.__name__: kind for kind in typing.get_args(Condition)}
_KIND = "is"
_PORTS = frozenset({"port", "last"})


def write(value: Access | Inbound | Reporting) -> str:
    """Equal values give equal text."""
    return json.dumps(_writable(value), sort_keys=True, separators=(",", ":"))


def read(kind: type[_T], text: str, field: str) -> _T:
    """Raises Wrong, naming the field in the text."""
    try:
        return cast(_T, _read(kind, json.loads(text), field))
    except (ValueError, RecursionError) as error:
        raise Wrong(field, f"is not JSON of such rules: {error}") from None


def _writable(value: Any) -> Any:
    if isinstance(value, RateLimit | Quota):
        return notes.write(value)
    if isinstance(value, tuple):
        return [_writable(each) for each in value]
    if not is_dataclass(value):
        return value
    kind = type(value)
    found = {
        each.name: _writable(getattr(value, each.name))
        for each in fields(value)
        if each.default is MISSING or getattr(value, each.name) != each.default
    }
    return {_KIND: kind.__name__, **found} if kind in _CONDITIONS.values() else found


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, note: Any, field: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is RateLimit or kind is Quota:
        return notes.read(kind, note, field)
    if origin is tuple:
        return _read_tuple(arguments, note, field)
    if origin is Literal:
        return notes.one_of(*arguments)(note, field)
    if origin in (types.UnionType, typing.Union):
        if type(None) not in arguments:
            return _read_condition(note, field)
        return None if note is None else _read(arguments[0], note, field)
    if is_dataclass(kind):
        return _read_value(cast(type, kind), note, field)
    if issubclass(kind, StrEnum):
        return kind(notes.one_of(*kind)(note, field))
    if kind is bool:
        return notes.flag(note, field)
    if kind is str:
        return notes.text(note, field)
    if kind is int:
        return notes.whole(0, 65535 if field.rpartition(".")[2] in _PORTS else 0xFFFFFFFF)(note, field)
    return notes.number(math.ulp(0.0), checks.LONGEST)(note, field)


def _read_tuple(arguments: tuple[Any, ...], note: Any, field: str) -> tuple[Any, ...]:
    if not isinstance(note, list):
        raise Wrong(field, f"must be a list, not {note!r}")
    if arguments[-1] is ...:
        return tuple(_read(arguments[0], each, f"{field}[{index}]") for index, each in enumerate(note))
    if len(note) != len(arguments):
        raise Wrong(field, f"must be a list of {len(arguments)}, not {note!r}")
    pairs = zip(arguments, note, strict=True)
    return tuple(_read(kind, each, f"{field}[{index}]") for index, (kind, each) in enumerate(pairs))


def _read_condition(note: Any, field: str) -> Any:
    name = note.get(_KIND) if isinstance(note, dict) else None
    if not isinstance(name, str) or name not in _CONDITIONS:
        raise Wrong(field, f"is no condition that is known here: {name!r}")
    return _read_value(_CONDITIONS[name], {key: value for key, value in note.items() if key != _KIND}, field)


def _read_value(kind: type, note: Any, field: str) -> Any:
    if not isinstance(note, dict):
        raise Wrong(field, f"must be an object, not {note!r}")
    hints = _hints(kind)
    for name in note:
        if name not in hints:
            raise Wrong(f"{field}.{name}", f"is no field of {kind.__name__} that is known here")
    found = {name: _read(hints[name], each, f"{field}.{name}") for name, each in note.items()}
    try:
        value = kind(**found)
    except TypeError:
        raise Wrong(field, f"is no {kind.__name__}: a field is missing") from None
    if isinstance(value, StringMatch) and value.kind == "regex":
        checks.regex(value.value, f"{field}.value")
    if isinstance(value, PathTemplate) and set("{*}") & set(re.sub(r"\{\*\*?\}", "", value.template)):
        raise Wrong(f"{field}.template", f"is no path template: {value.template!r}")
    if isinstance(value, AddressIs):
        try:
            ipaddress.ip_network(value.cidr, strict=False)
        except ValueError:
            raise Wrong(f"{field}.cidr", f"is no range of addresses: {value.cidr!r}") from None
    return value
