"""What is a SPIFFE ID, and what only looks like one."""

from __future__ import annotations

import pytest

from meshlib.model import SpiffeId


def test_a_workload_of_istio_has_namespace_and_service_account() -> None:
    """And what AuthorizationPolicy calls its principal."""
    found = SpiffeId.parse("spiffe://cluster.local/ns/default/sa/bookinfo-reviews")
    assert found == SpiffeId.of("cluster.local", "default", "bookinfo-reviews")
    assert (found.namespace, found.service_account) == ("default", "bookinfo-reviews")
    assert found.principal == "cluster.local/ns/default/sa/bookinfo-reviews"
    assert SpiffeId.parse(found.uri) == found


def test_another_path_is_an_identity_without_namespace() -> None:
    """SPIFFE leaves the path to its issuer."""
    found = SpiffeId.parse("spiffe://example.org/billing/db")
    assert (found.namespace, found.service_account, found.principal) == ("", "", "example.org/billing/db")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "https://cluster.local/ns/a/sa/b",
        "spiffe:///ns/a/sa/b",
        "spiffe://cluster.local",
        "spiffe://cluster.local/",
        "spiffe://Cluster.local/ns/a/sa/b",
        "spiffe://user@cluster.local/ns/a/sa/b",
        "spiffe://cluster.local:8080/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b/",
        "spiffe://cluster.local/ns//sa/b",
        "spiffe://cluster.local/ns/../sa/b",
        "spiffe://cluster.local/ns/a/sa/b?x=1",
        "spiffe://cluster.local/ns/a/sa/b#x",
        "spiffe://cluster.local/ns/%61/sa/b",
        "spiffe://cluster.local/ns/a/sa/b\n",
        "spiffe://cluster.local/" + "a" * 2048,
    ],
)
def test_what_the_specification_does_not_allow_is_refused(uri: str) -> None:
    """An identity that two parsers read differently is nobody's."""
    with pytest.raises(ValueError, match="SPIFFE ID"):
        SpiffeId.parse(uri)
