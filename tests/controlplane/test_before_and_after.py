"""Is the traffic on either side of a change what was pushed, and is it told how much is known?"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from meshlib.controlplane import admin_api as api
from meshlib.controlplane.before_and_after import BeforeAndAfter, before_and_after, sides, touched_by
from meshlib.controlplane.history import Change
from meshlib.controlplane.telemetry_store import Cell, Labels
from pushes import REVIEWS

NOW = 1_000_000.0
SERVICE, BAD = "service:default/reviews", REVIEWS._replace(response_code="503")
ENDPOINT = api.ServiceEndpoint("10.0.0.1:9080", labels={"app": "reviews"})
RATINGS, TO_RATINGS = "service:default/ratings", "{route: [{destination: {host: ratings}}]}"
SERVICES = [
    api.ServiceEndpoints("reviews", "default", "reviews.default.svc.cluster.local", (9080,), (ENDPOINT,)),
    api.ServiceEndpoints("ratings", "default", "ratings.default.svc.cluster.local", (9080,), ()),
    api.ServiceEndpoints("reviews", "other", "reviews.other.svc.cluster.local", (9080,), ()),
]


def cell(requests: int) -> Cell:
    made = Cell()
    made.requests = requests
    return made


def change(at: float = NOW, number: int = 1, before: str = "", after: str = "") -> Change:
    return Change(number, at, "VirtualService default/reviews", "applied", "", before, after, "", "default")


def looked(slots: Mapping[float, Mapping[Labels, int]], now: float, *others: Change) -> BeforeAndAfter:
    cells = [(at, 5.0, {labels: cell(count) for labels, count in told.items()}) for at, told in sorted(slots.items())]
    return before_and_after(change(NOW + 2), [SERVICE], sides(NOW + 2, 60, now), cells, now, others)


def test_each_side_is_whole_slots_without_that_of_the_change() -> None:
    """60 seconds each; what happened while it was taking effect is nobody's."""
    told = {NOW - 65: {REVIEWS: 1000}, NOW - 60: {REVIEWS: 30}, NOW: {REVIEWS: 500}, NOW + 5: {BAD: 60, REVIEWS: 60}}
    found = looked(told, NOW + 100)
    [touched] = found.services
    assert (touched.before.requests, touched.before.rates.rps) == (30, 0.5)
    assert (touched.after.requests, touched.after.rates.rps, touched.after.rates.errors) == (120, 2.0, 0.5)
    assert (found.seconds, found.remaining) == (60, 0.0)
    assert [point.failed for point in touched.points if point.at == NOW + 5] == [12.0]


def test_what_comes_after_is_of_the_time_that_has_passed() -> None:
    """Rates would be too low otherwise; and how long is missing is told."""
    found = looked({NOW + 5: {REVIEWS: 10}}, NOW + 15)
    assert (found.services[0].after.rates.rps, found.services[0].after.end, found.remaining) == (1.0, NOW + 15, 50.0)


def test_other_changes_of_that_time_are_named_and_silence_is_counted() -> None:
    """Either may be the cause of what is seen."""
    found = looked({}, NOW + 100, change(NOW + 2), change(NOW - 10, 7), change(NOW - 1000, 8))
    assert (found.others, found.services, found.silent) == ((7,), (), 1)


def test_what_is_older_is_told_by_the_minute() -> None:
    """A quarter of an hour is remembered by five seconds."""
    (start, end), (resumed, until) = sides(NOW, 60, NOW + 3600)
    assert (end - start, until - resumed, resumed - end) == (300, 300, 60)
    assert end <= NOW < resumed


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"networking.istio.io/v1, VirtualService, {{hosts: [reviews], http: [{TO_RATINGS}]}}", [SERVICE, RATINGS]),
        ("networking.istio.io/v1, DestinationRule, {host: reviews}", [SERVICE]),
        ("security.istio.io/v1, AuthorizationPolicy, {selector: {matchLabels: {app: reviews}}}", [SERVICE]),
        ("security.istio.io/v1, PeerAuthentication, {mtls: {mode: STRICT}}", [SERVICE, RATINGS]),
        ("", []),
    ],
)
def test_the_services_that_an_object_is_about(text: str, names: list[str]) -> None:
    """By host, selector and namespace; what was deleted was about them, too."""
    if text:
        version, kind, spec = text.split(", ", 2)
        text = f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x, namespace: default}}\nspec: {spec}\n"
    assert touched_by(change(before=text), SERVICES, "istio-system") == names
