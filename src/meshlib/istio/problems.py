"""What is said of an object that can't be used, or of a part of one that is not honoured?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshlib.errors import ConfigurationError


class ConfigurationWarning(ConfigurationError):
    """The object is used; what `reason` says about it should be known all the same."""


def in_order(problems: Iterable[ConfigurationError]) -> tuple[ConfigurationError, ...]:
    """Without repetition, by file and line, then by object and field: the same input gives the same list."""
    unique = {(_place(problem.source), problem.object, problem.field, problem.reason): problem for problem in problems}
    return tuple(unique[key] for key in sorted(unique))


def by_object(warnings: Iterable[ConfigurationWarning]) -> Mapping[str, tuple[ConfigurationWarning, ...]]:
    """By the title of the object that each is about."""
    found: dict[str, list[ConfigurationWarning]] = {}
    for warning in warnings:
        found.setdefault(warning.object, []).append(warning)
    return {title: tuple(about) for title, about in found.items()}


def _place(source: str) -> tuple[str, int]:
    file, _, line = source.rpartition(":")
    return (file, int(line)) if line.isdecimal() else (source, 0)


class Refused(Exception):
    """An object can't be used. field: below the object's spec."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason
