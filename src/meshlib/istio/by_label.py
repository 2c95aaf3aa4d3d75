"""Which of many does a selector choose?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

Labels = Mapping[str, str]
T = TypeVar("T")


class ByLabel(Generic[T]):
    """Finds what a selector chooses without looking at everything: by the rarest of the pairs it asks for."""

    def __init__(self, entries: Iterable[tuple[str, Labels, T]]) -> None:
        self._entries: dict[tuple[str, str, str], list[tuple[Labels, T]]] = {}
        for namespace, labels, entry in entries:
            for key, value in labels.items():
                self._entries.setdefault((namespace, key, value), []).append((labels, entry))

    def chosen(self, namespace: str, selector: Labels) -> list[T]:
        """In order. An empty selector chooses nothing (a Service's, a ServiceEntry's)."""
        if not selector:
            return []
        rarest = min((self._entries.get((namespace, *pair), []) for pair in selector.items()), key=len)
        return [entry for labels, entry in rarest if all(labels.get(k) == v for k, v in selector.items())]
