"""Which objects are in force, and in which order? Kept from one change to the next: what a change costs is what it
changes, not how much there is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from meshlib.controlplane.kinds import position
from meshlib.istio.problems import ConfigurationWarning
from meshlib.istio.resources import Object, dump_yaml

FEW = 200
"""So many objects are put in their places one by one; more are sorted with all others."""


class Key(NamedTuple):
    """What tells two objects apart. (`Object.key` lacks the group: Istio and the Gateway API both have a Gateway.)"""

    group: str
    kind: str
    namespace: str
    name: str


def key_of(given: Object) -> Key:
    return Key(given.api_version.rpartition("/")[0], *given.key)


@dataclass(frozen=True)
class Held:
    """An object with its history. created, changed: seconds since 1970."""

    object: Object
    created: float
    changed: float
    warnings: tuple[ConfigurationWarning, ...] = ()

    @cached_property
    def yaml(self) -> str:
        """Made once: a cluster's objects are many, and few of them change."""
        return dump_yaml(self.object)


Place = tuple[int, Key]


def place_of(key: Key) -> Place:
    """Where it comes in a list of all: kinds in their fixed order, then by name."""
    return (position(key.kind, key.group), key)


class InForce:
    """What is in force, in order. Not thread-safe, but for `objects`: a tuple that is replaced whole."""

    def __init__(self, held: Mapping[Key, Held]) -> None:
        self._held = dict(held)
        self._sort()

    def _sort(self) -> None:
        self._places: list[Place] = sorted(map(place_of, self._held))
        self._objects = [self._held[key].object for _, key in self._places]
        self._warned = {key: each for key, each in self._held.items() if each.warnings}
        self.objects: tuple[Object, ...] = tuple(self._objects)
        """The very same tuple until something changes."""

    def update(self, changes: Mapping[Key, Held | None]) -> None:
        """None is in force no more."""
        if len(changes) > FEW:
            for key, held in changes.items():
                if held is None:
                    self._held.pop(key, None)
                else:
                    self._held[key] = held
            self._sort()
            return
        for key, held in changes.items():
            self._put(key, held)
        if changes:
            self.objects = tuple(self._objects)

    def _put(self, key: Key, held: Held | None) -> None:
        place = place_of(key)
        index, is_there = bisect_left(self._places, place), key in self._held
        self._warned.pop(key, None)
        if held is None:
            if is_there:
                del self._held[key], self._places[index], self._objects[index]
            return
        self._held[key] = held
        if held.warnings:
            self._warned[key] = held
        if is_there:
            self._objects[index] = held.object
        else:
            self._places.insert(index, place)
            self._objects.insert(index, held.object)

    def warnings(self) -> Iterable[ConfigurationWarning]:
        return [warning for held in self._warned.values() for warning in held.warnings]

    def __repr__(self) -> str:
        return f"<InForce {len(self._objects)} objects>"
