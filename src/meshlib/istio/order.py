"""In which order do objects count? The oldest first. And which of them only say who runs?"""

from __future__ import annotations

from bisect import bisect_left, insort_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from meshlib.istio import resources as r
from meshlib.istio.sameness import are_same, same_ends

RUNNING = frozenset({r.Pod, r.Endpoints, r.EndpointSlice, r.KubernetesNode, r.WorkloadEntry, r.ServiceEntry})
"""Whose specs nothing but the registry reads: the services that are made of them are all that they mean."""
FEW = 50
"""So many new objects are put in their places one by one; more are sorted with all others."""


class Parts(NamedTuple):
    """Objects as they were given. running: of which only services are made, by kind; rules: all others."""

    given: tuple[r.Object, ...]
    rules: tuple[r.Object, ...]
    running: Mapping[str, tuple[r.Object, ...]]

    @classmethod
    def of(cls, objects: Iterable[r.Object], before: Parts | None = None) -> Parts:
        """before: of the objects before a change; the parts that it leaves alone are the very same."""
        given = tuple(objects)
        if before is not None:
            return before._then(given)
        running: dict[str, list[r.Object]] = {}
        for each in given:
            if type(each.spec) in RUNNING:
                running.setdefault(each.kind, []).append(each)
        rules = tuple([each for each in given if type(each.spec) not in RUNNING])
        return cls(given, rules, {kind: tuple(found) for kind, found in running.items()})

    def _then(self, given: tuple[r.Object, ...]) -> Parts:
        start, end = same_ends(self.given, given)
        old, new = self.given[start : len(self.given) - end], given[start : len(given) - end]
        if any(type(each.spec) not in RUNNING for each in (*old, *new)):
            return Parts.of(given)._sharing(self)
        running = dict(self.running)
        for kind in {each.kind for each in (*old, *new)}:
            gone = [each for each in old if each.kind == kind]
            known = running.get(kind, ())
            if gone:
                at = next(index for index, each in enumerate(known) if each is gone[0])
            else:
                at = sum(1 for each in given[:start] if each.kind == kind and type(each.spec) in RUNNING)
            come = [each for each in new if each.kind == kind]
            running[kind] = (*known[:at], *come, *known[at + len(gone) :])
        return Parts(given, self.rules, running)

    def _sharing(self, before: Parts) -> Parts:
        """The same; what is as before is the very same."""
        running = {kind: _shared(found, before.running.get(kind, ())) for kind, found in self.running.items()}
        return self._replace(rules=_shared(self.rules, before.rules), running=running)


def _shared(found: tuple[r.Object, ...], before: tuple[r.Object, ...]) -> tuple[r.Object, ...]:
    return before if are_same(before, found) else found


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
        start, end = same_ends(self._given, given)
        old_ones, new_ones = self._given[start : len(self._given) - end], given[start : len(given) - end]
        if len(old_ones) <= FEW and len(new_ones) <= FEW:
            return self._exchanged(old_ones, new_ones)
        old, new = set(map(id, self._given)), set(map(id, given))
        come = [each for each in given if id(each) not in old]
        if len(come) > FEW or len(new) != len(given):
            return None
        found = [each for each in self.objects if id(each) in new]
        for each in come:
            insort_right(found, each, key=_order)
        # Of equals the first that was given comes first; that is for sorted() to tell.
        return found if all(map(_differ, found, found[1:])) else None

    def _exchanged(self, gone: Iterable[r.Object], come: Iterable[r.Object]) -> list[r.Object] | None:
        found = list(self.objects)
        for each in gone:
            index = bisect_left(found, _order(each), key=_order)
            while found[index] is not each:  # of equals
                index += 1
            del found[index]
        for each in come:
            index = bisect_left(found, _order(each), key=_order)
            if index < len(found) and not _differ(each, found[index]):
                return None
            found.insert(index, each)
        return found

    def __repr__(self) -> str:
        return f"<Ordered {len(self.objects)} objects>"


def _differ(one: r.Object, two: r.Object) -> bool:
    return one.name != two.name or _order(one) != _order(two)


def _order(given: r.Object) -> tuple[str, str, str, str, str]:
    return (given.created, given.name, given.namespace, given.kind, given.api_version)
