"""Virtual host domains are searched as Envoy searches them."""

from __future__ import annotations

import pytest

from meshlib.model import DomainTable

TABLE = DomainTable(
    (domain, domain)
    for domain in ("*", "*.com", "*.example.com", "www.example.com", "foo.*", "foo.bar.*", "reviews:9080", "*-x.net")
)


@pytest.mark.parametrize(
    ("host", "entry"),
    [
        ("www.example.com", "www.example.com"),
        ("WWW.Example.COM", "www.example.com"),
        ("api.example.com", "*.example.com"),
        ("a.b.example.com", "*.example.com"),
        ("example.com", "*.com"),
        (".example.com", "*.com"),
        ("foo.org", "foo.*"),
        ("foo.bar.org", "foo.bar.*"),
        ("foo.com", "*.com"),
        ("reviews:9080", "reviews:9080"),
        ("reviews", "*"),
        ("a-x.net", "*-x.net"),
    ],
)
def test_exact_then_longest_suffix_then_longest_prefix_then_any(host: str, entry: str) -> None:
    """Envoy's order; a wildcard stands for at least one character."""
    assert TABLE.find(host) == entry


def test_the_first_of_two_entries_with_one_domain_wins() -> None:
    """Istio keeps the oldest object."""
    assert DomainTable([("a", 1), ("A", 2)]).find("a") == 1


def test_a_table_without_any_finds_nothing_for_a_stranger() -> None:
    """No entry is no entry."""
    assert DomainTable([("a", 1), ("*.b", 2)]).find("b") is None
