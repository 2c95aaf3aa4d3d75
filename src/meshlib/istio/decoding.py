"""How does what was written become an object's content, and what is said when it can't?"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from meshlib.istio import resources as r
from meshlib.state import forks

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|us|µs|ns|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def converted(content: Any, wanted: Any) -> Any:
    """Raises msgspec.ValidationError."""
    with forks.whole:
        return msgspec.convert(content, wanted, dec_hook=_decode)


def told(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")


def without_nulls(value: Any) -> Any:
    """A field that is null is a field that is not set (Kubernetes)."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def _decode(wanted: type, value: Any) -> Any:
    if wanted is r.Duration:
        return parse_duration(value)
    raise NotImplementedError(wanted)


def parse_duration(value: Any) -> r.Duration:
    """`1.5s` -> Duration(1.5). Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"a duration has a unit, as in 5s or 250ms; found {value!r}")
    position, seconds = 0, 0.0
    while position < len(value):
        part = _DURATION.match(value, position)
        if part is None:
            raise ValueError(f"no duration: {value!r}; write 5s, 250ms, 1h30m")
        seconds += float(part[1]) * _UNITS[part[2]]
        position = part.end()
    if not value or seconds > 315_576_000_000:
        raise ValueError(f"no duration: {value!r}")
    return r.Duration(seconds)


def with_key(message: str, content: Any, wanted: type) -> str:
    """msgspec says `[...]` for any key of a mapping. Which one it is shows by trying each alone."""
    before, found, _ = message.partition(" - at `")[2].partition("[...]")
    if not found:
        return message
    path = steps(before.removeprefix("$"))
    table = content
    for step in path:
        table = table[step]
    for key, value in table.items():
        try:
            converted(_replaced(content, path, {key: value}), wanted)
        except msgspec.ValidationError as error:
            if str(error) == message:
                return message.replace("[...]", f".{key}", 1)
    return message


def _replaced(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """`content` with `value` at `path`."""
    if not path:
        return value
    copy: Any = content.copy()
    copy[path[0]] = _replaced(content[path[0]], path[1:], value)
    return copy


def explained(message: str, prefix: str) -> tuple[str, str]:
    """msgspec's message -> (field, reason). `Expected `int`, got `str` - at `$.http[0].port``"""
    reason, mark, place = message.partition(" - at `")
    field = place.rstrip("`").removeprefix("$").removeprefix(".") if mark else ""
    field = ".".join(part for part in (prefix, field) if part)
    unknown = re.match(r"Object contains unknown field `(.*)`", reason)
    if unknown:
        return f"{field}.{unknown[1]}" if field else unknown[1], "there is no such field"
    missing = re.match(r"Object missing required field `(.*)`", reason)
    if missing:
        return f"{field}.{missing[1]}" if field else missing[1], "is missing"
    enum = re.match(r"Invalid enum value '(.*)'", reason)
    if enum:
        return field, f"unknown value {enum[1]!r}"
    expected = re.match(r"Expected `(.*)`, got `(.*)`", reason)
    if expected:
        names = {
            "str": "text",
            "object": "a mapping",
            "array": "a list",
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
        }
        wanted = " or ".join(names.get(part, part) for part in expected[1].split(" | ") if part != "null")
        return field, f"must be {wanted}, not {names.get(expected[2], expected[2])}"
    return field, reason[:1].lower() + reason[1:]


def steps(field: str) -> tuple[str | int, ...]:
    """`spec.http[0].route` -> ("spec", "http", 0, "route")"""
    found = re.findall(r"([^.\[\]]+)|\[(\d+)\]", field)
    return tuple(int(index) if index else name for name, index in found)
