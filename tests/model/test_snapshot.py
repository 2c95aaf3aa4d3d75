"""A snapshot can say whether it is consistent, and whether another one says the same."""

from __future__ import annotations

from dataclasses import replace

from meshlib.model import Cluster, ClusterType, Listener, RouteConfiguration, Snapshot
from snapshots import service

REVIEWS = service("reviews:9080", [("10.0.0.1", 9080)])


def test_a_snapshot_whose_references_all_lead_somewhere_has_no_inconsistency() -> None:
    """The commonest snapshot there is."""
    assert REVIEWS.inconsistencies() == ()


def test_a_listener_without_its_route_configuration_is_named() -> None:
    """LDS may not run ahead of RDS."""
    broken = replace(REVIEWS, route_configurations=())
    assert broken.inconsistencies() == (
        "listener 'reviews:9080' names route configuration 'reviews:9080', which is missing",
    )


def test_an_eds_cluster_without_its_assignment_is_named() -> None:
    """CDS may not run ahead of EDS: an absent assignment is a cluster that never warms, an empty one is a service
    without endpoints."""
    broken = replace(REVIEWS, assignments=())
    assert broken.inconsistencies() == ("cluster 'reviews:9080' has no load assignment",)
    passthrough = Snapshot(clusters=(Cluster("any", type=ClusterType.ORIGINAL_DST),))
    assert passthrough.inconsistencies() == ()


def test_names_out_of_order_or_twice_are_an_inconsistency() -> None:
    """Sorted names are what makes two equal snapshots equal."""
    twice = Snapshot(
        listeners=(Listener("b", "r"), Listener("a", "r")), route_configurations=(RouteConfiguration("r", ()),)
    )
    assert twice.inconsistencies() == ("listener names are not sorted and unique",)


def test_the_version_is_no_part_of_the_content() -> None:
    """A control plane that restarts counts anew; nothing has changed for its clients."""
    assert REVIEWS.same_content(replace(REVIEWS, version="2"))
    assert not REVIEWS.same_content(replace(REVIEWS, complete=False))
