"""What do a cluster's objects say together, and what of it is new since the last look?

One object of ten thousand changes; what is told then is that one. Only what is wrong is told whole each time: it is
little, and an object that is mended can take back what was said, or refused, because of another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from meshlib.controlplane.in_force import Key, key_of
from meshlib.errors import ConfigurationError
from meshlib.istio import closing
from meshlib.istio.folder import Contents
from meshlib.istio.parse import Parsed
from meshlib.istio.problems import ConfigurationWarning, by_object, in_order
from meshlib.istio.resources import Object


class Said(NamedTuple):
    """An object, and what its author should know about it."""

    object: Object
    warnings: tuple[ConfigurationWarning, ...] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """objects: what is new or has another form; None is gone. problems: all that there are now."""

    objects: Mapping[Key, Said | None] = field(default_factory=dict)
    problems: tuple[ConfigurationError, ...] = ()

    @classmethod
    def of_all(cls, contents: Contents) -> Update:
        """For who knows nothing yet."""
        about = by_object(contents.warnings)
        told = {key_of(each): Said(each, about.get(each.title, ())) for each in contents.objects}
        return cls(told, contents.problems)


class Gathered:
    """What each place (an object's, in its collection) was read as. No two places have objects of one name."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, Parsed] = {}
        self._usable: dict[Key, Hashable] = {}
        self._faulty: dict[Hashable, Parsed] = {}
        """The parts with problems, or with what stands for objects that can't be used."""
        self._told: dict[Hashable, Parsed | None] = {}
        """The places that have changed since the last look, with what they said then."""
        self._closed: dict[Key, Object] = {}
        """What stands for others now, as it was told."""

    def get(self, place: Hashable) -> Parsed | None:
        return self._parts.get(place)

    def put(self, place: Hashable, parsed: Parsed | None) -> None:
        """None is gone."""
        old = self._parts.pop(place, None)
        self._faulty.pop(place, None)
        for each in old.objects if old is not None else ():
            self._usable.pop(key_of(each), None)
        self._told.setdefault(place, old)
        if parsed is None:
            return
        self._parts[place] = parsed
        for each in parsed.objects:
            self._usable[key_of(each)] = place
        if parsed.problems or parsed.closed:
            self._faulty[place] = parsed

    def news(self) -> Update:
        """What has changed since this was asked last; at first that is all."""
        found: dict[Key, Said | None] = {}
        for place, old in self._told.items():
            now = self._parts.get(place)
            for each in old.objects if old is not None else ():
                if (key := key_of(each)) not in self._usable:
                    found[key] = None
            if now is not None:
                about = by_object(now.warnings)
                found.update((key_of(each), Said(each, about.get(each.title, ()))) for each in now.objects)
        self._told.clear()
        closed = {key_of(each): each for each in closing.missing(self._usable, self._all_closed())}
        found.update((key, None) for key in self._closed if key not in closed and key not in self._usable)
        found.update((key, Said(each)) for key, each in closed.items() if self._closed.get(key) != each)
        self._closed = closed
        return Update(found, self._problems(closed))

    def contents(self) -> Contents:
        """All that is known now."""
        closed = closing.missing(self._usable, self._all_closed())
        return Contents(
            (*(each for part in self._parts.values() for each in part.objects), *closed),
            self._problems({key_of(each): each for each in closed}),
            tuple(each for part in self._parts.values() for each in part.warnings),
        )

    def _all_closed(self) -> list[Object]:
        return [each for part in self._faulty.values() for each in part.closed]

    def _problems(self, closed: Mapping[Key, Object]) -> tuple[ConfigurationError, ...]:
        found = in_order(each for part in self._faulty.values() for each in part.problems)
        return in_order(closing.told(found, closed.values()))

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"<Gathered {len(self._parts)} objects, {len(self._faulty)} of them with problems>"
