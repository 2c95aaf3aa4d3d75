"""What differs between two views? Found once for each pair, and shared by all streams that go from one to the other.

With it a change costs a stream as much as it changes for it. Without it each stream would compare all that there is
with all that it was sent, at every change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from meshlib.controlplane.resource import Resource
from meshlib.xds.resource_types import LISTENER


class Changes(NamedTuple):
    """Of one type. names: of the resources that are new, are others, or are gone. renamed: whether what is answered to
    a name that no resource bears (a host that a wildcard covers) may have become another."""

    names: frozenset[str] = frozenset()
    renamed: bool = False


NOTHING = Changes()
ChangesByType = Mapping[str, Changes]


class Comparable:
    """A Seen that knows what differs between it and others. Immutable, as all of them are."""

    resources: Mapping[str, Mapping[str, Resource]]

    unnamed: Any
    """What decides on the answers to names that no resource bears; compared by ==."""

    @cached_property
    def _since(self) -> WeakKeyDictionary[Any, ChangesByType]:
        """By what came before, for as long as a stream has it."""
        return WeakKeyDictionary()

    def changes_since(self, before: Any) -> ChangesByType:
        """By type; one that is missing has none. before: a Seen."""
        found = self._since.get(before)
        if found is None:
            found = self._since[before] = self._compared(before)
        return found

    def _compared(self, before: Any) -> ChangesByType:
        found = {
            type_url: Changes(differing(before.resources.get(type_url, {}), self.resources.get(type_url, {})))
            for type_url in {**before.resources, **self.resources}
        }
        if type(before) is not type(self) or before.unnamed != self.unnamed:
            found[LISTENER] = found[LISTENER]._replace(renamed=True)
        return {type_url: changes for type_url, changes in found.items() if changes != NOTHING}


def differing(before: Mapping[str, Resource], after: Mapping[str, Resource]) -> frozenset[str]:
    """The names of what has another version in one than in the other, or is in one of them only."""
    if before is after:
        return frozenset()
    changed: Collection[str] = [
        name
        for name, resource in after.items()
        if (known := before.get(name)) is not resource and (known is None or known.version != resource.version)
    ]
    return frozenset(changed).union(before.keys() - after.keys())
