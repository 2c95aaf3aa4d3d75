"""Are names that mean the same the same, and is what is no name none?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.xds.xdstp import ResourceName, parse

KIND = "envoy.config.listener.v3.Listener"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"xdstp://mesh.example/{KIND}/web:80", ResourceName("mesh.example", KIND, "web:80")),
        (f"xdstp:///{KIND}/a/b", ResourceName("", KIND, "a/b")),
        (f"xdstp://a/{KIND}/outbound%7C80%7C%7Cweb", ResourceName("a", KIND, "outbound|80||web")),
        (f"xdstp://a/{KIND}/x?b=2&a=1", ResourceName("a", KIND, "x", (("a", "1"), ("b", "2")))),
        (f"xdstp://a/{KIND}/x#entry=y", ResourceName("a", KIND, "x")),
        (f"xdstp://a/{KIND}/x?a=", ResourceName("a", KIND, "x", (("a", ""),))),
        ("web:80", None),
        (f"xdstp://a/{KIND}", None),
        (f"xdstp://a/{KIND}/", None),
        ("xdstp://a//x", None),
        (f"xdstp://a/{KIND}/x?a=1&a=2", None),
        (f"xdstp://a/{KIND}/x?a", None),
        ("xdstp://[/b/c", None),
    ],
)
def test_a_name_is_read(name: str, expected: ResourceName | None) -> None:
    """gRFC A47's grammar; what breaks it is no name, and so nobody has it."""
    assert parse(name) == expected


def test_the_order_of_context_parameters_means_nothing() -> None:
    """Nor do directives, nor what is escaped though it need not be."""
    texts = ("w:80?b=2&a=1", "w:80?a=1&b=2", "w%3A80?a=1&b=2", "w:80?a=1&b=2#alt=x")
    assert {parse(f"xdstp://a/{KIND}/{text}") for text in texts} == {
        ResourceName("a", KIND, "w:80", (("a", "1"), ("b", "2")))
    }


def test_the_plain_name_has_the_context() -> None:
    """A gRPC server's listener is one such name."""
    found = parse(f"xdstp://a/{KIND}/grpc/server?xds.resource.listening_address=0.0.0.0:80")
    assert found is not None and found.plain == "grpc/server?xds.resource.listening_address=0.0.0.0:80"


@given(st.text(), st.text(), st.text())
def test_whatever_comes_is_a_name_or_none(authority: str, path: str, query: str) -> None:
    """It is a stranger who writes it."""
    found = parse(f"xdstp://{authority}/{path}?{query}")
    assert found is None or (found.type_name and found.id)
