"""In which order do objects count? The oldest first. And which of them only say who runs?"""

from __future__ import annotations

from bisect import insort_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from meshlib.istio import resources as r
from meshlib.istio.services import are_same

RUNNING = frozenset({r.Pod, r.Endpoints, r.EndpointSlice, r.KubernetesNode, r.WorkloadEntry, r.ServiceEntry})
"""Whose specs nothing but the registry reads: the services that are made of them are all that they mean."""
FEW = 50
"""So many new objects are put in their places one by one; more are sorted with all others."""


class Parts(NamedTuple):
    """Objects as they were given. running: of which only services are made; rules: all others."""

    rules: tuple[r.Object, ...]
    running: tuple[r.Object, ...]

    @classmethod
    def of(cls, objects: Iterable[r.Object]) -> Parts:
        given = tuple(objects)
        return cls(
            tuple([each for each in given if type(each.spec) not in RUNNING]),
            tuple([each for each in given if type(each.spec) in RUNNING]),
        )


def in_order(objects: Iterable[r.Object]) -> list[r.Object]:
    """Oldest first, then by name and namespace: whoever comes first has the host (sortConfigByCreationTime). What gives
    no age counts as the oldest, so that files alone are ordered by name."""
    return sorted(objects, key=_order)


class Ordered:
    """The same, where most objects are those of before. before: of the objects before a change."""

    def __init__(self, given: Sequence[r.Object], before: Ordered | None = None) -> None:
        self._given = given
        found = None if before is None else before._then(given)
        self.objects: list[r.Object] = in_order(given) if found is None else found

    def _then(self, given: Sequence[r.Object]) -> list[r.Object] | None:
        """None where it is as well to begin anew."""
        if are_same(self._given, given):
            return self.objects
        old, new = set(map(id, self._given)), set(map(id, given))
        come = [each for each in given if id(each) not in old]
        if len(come) > FEW or len(new) != len(given):
            return None
        found = [each for each in self.objects if id(each) in new]
        for each in come:
            insort_right(found, each, key=_order)
        # Of equals the first that was given comes first; that is for sorted() to tell.
        return found if all(map(_differ, found, found[1:])) else None

    def __repr__(self) -> str:
        return f"<Ordered {len(self.objects)} objects>"


def _differ(one: r.Object, two: r.Object) -> bool:
    return one.name != two.name or _order(one) != _order(two)


def _order(given: r.Object) -> tuple[str, str, str, str, str]:
    return (given.created, given.name, given.namespace, given.kind, given.api_version)
