"""How was the traffic before a change of the configuration, and how is it after it? Per service that it touches.

Counts are of whole slots of time: the slot in which the change fell counts for neither side. What came after may not be
over yet, and there may be little of it; both are told, for the reader to judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import yaml

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.concerns import Concerned
from meshlib.controlplane.graph import Rates, agreed, rates
from meshlib.controlplane.history import Change
from meshlib.controlplane.series import Slot
from meshlib.controlplane.telemetry_store import COARSE, FINE, FINE_SLOTS, Cell, Labels
from meshlib.istio import resources as r
from meshlib.istio.parse import parse_text

LEAST_SLOTS = 5
"""Fewer say nothing of a rate."""
MOST_SERVICES = 20
Window = tuple[float, float]
"""[start, end), seconds since 1970."""


class Stretch(msgspec.Struct, frozen=True):
    """start, end: seconds since 1970. requests: how many `rates` are of."""

    start: float
    end: float
    requests: int = 0
    rates: Rates = Rates()


class At(msgspec.Struct, frozen=True):
    """One slot. rps: requests a second; failed: of them."""

    at: float
    rps: float
    failed: float


class Touched(msgspec.Struct, frozen=True):
    """service: id of its node. points: from the start of `before` to the end of `after`; slots without requests are not
    among them."""

    service: str
    before: Stretch
    after: Stretch
    points: tuple[At, ...] = ()


class BeforeAndAfter(msgspec.Struct, frozen=True):
    """number: of the change. seconds: of either side. remaining: seconds until what comes after is whole; 0 is now.
    others: numbers of other changes on either side, which may have had the effect as well. services: that the object is
    about and that had requests; silent: how many had none; left_out: beyond MOST_SERVICES."""

    number: int
    at: float
    seconds: float
    remaining: float
    others: tuple[int, ...] = ()
    services: tuple[Touched, ...] = ()
    silent: int = 0
    left_out: int = 0


def sides(at: float, seconds: float, now: float) -> tuple[Window, Window]:
    """The windows before and after, of whole slots as the memory has them at `now`: by the minute for what is older
    than its last quarter of an hour, and then longer."""
    width = FINE if at - seconds > now - FINE * FINE_SLOTS + FINE else COARSE
    long = max(math.ceil(seconds / width), LEAST_SLOTS) * width
    began = math.floor(at / width) * width
    return (began - long, began), (began + width, began + width + long)


def before_and_after(
    change: Change,
    touched: Sequence[str],
    windows: tuple[Window, Window],
    slots: Iterable[Slot],
    now: float,
    others: Iterable[Change] = (),
) -> BeforeAndAfter:
    """touched: ids of the services. slots: those of both windows, of what the reader may see. others: all changes."""
    (start, middle), (resumed, end) = windows
    counted: dict[str, list[tuple[float, float, list[tuple[Labels, Cell]]]]] = {name: [] for name in touched}
    for began, width, cells in slots:
        found: dict[str, list[tuple[Labels, Cell]]] = {}
        for labels, cell in agreed(cells).items():
            name = f"service:{labels.destination_service_namespace}/{labels.destination_service_name}"
            if name in counted:
                found.setdefault(name, []).append((labels, cell))
        for name, pairs in found.items():
            counted[name].append((began, width, pairs))
    until = min(end, max(resumed, now))
    services = []
    for name, told in counted.items():
        before = _stretch(start, middle, told, middle - start)
        after = _stretch(resumed, end, told, until - resumed)
        if before.requests or after.requests:
            services.append(Touched(name, before, after, tuple(_point(*each) for each in told)))
    services.sort(key=lambda each: (-each.before.requests - each.after.requests, each.service))
    return BeforeAndAfter(
        change.number,
        change.at,
        middle - start,
        max(0.0, end - now),
        tuple(each.number for each in others if each.number != change.number and start <= each.at < end),
        tuple(services[:MOST_SERVICES]),
        len(touched) - len(services),
        max(0, len(services) - MOST_SERVICES),
    )


def _stretch(
    start: float, end: float, slots: Iterable[tuple[float, float, list[tuple[Labels, Cell]]]], seconds: float
) -> Stretch:
    pairs = [pair for began, width, pairs in slots if start <= began and began + width <= end for pair in pairs]
    requests = sum(cell.requests for _, cell in pairs)
    return Stretch(start, start + seconds, requests, rates(pairs, max(seconds, 1e-9)) if requests else Rates())


def _point(began: float, width: float, pairs: list[tuple[Labels, Cell]]) -> At:
    found = rates(pairs, width)
    return At(began, found.rps, found.rps * found.errors)


def touched_by(change: Change, services: Sequence[api.ServiceEndpoints], root: str) -> list[str]:
    """Ids of the services that the object is about, as it was before or as it is after; of a kind that says something
    of all of a namespace, all of them. root: the root namespace."""
    objects = [each for text in (change.before, change.after) for each in _objects(text)]
    return [
        f"service:{service.namespace}/{service.name}"
        for service in services
        if any(_concerned(service, root).by(each) for each in objects)
    ]


def _concerned(service: api.ServiceEndpoints, root: str) -> Concerned:
    labels: tuple[Mapping[str, str], ...] = tuple(each.labels for each in service.endpoints)
    return Concerned(service.namespace, frozenset((service.host,)), frozenset((service.name,)), labels, root)


def _objects(text: str) -> Sequence[r.Object]:
    """What was stored can be read; what was redacted in it is left as it is."""
    try:
        return parse_text(text, "history").objects if text else ()
    except (ValueError, yaml.YAMLError):
        return ()
