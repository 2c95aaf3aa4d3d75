"""What would be one header more, or half a message, once it stands in a message's head, never gets that far."""

from __future__ import annotations

from typing import Any

import pytest

from meshlib.errors import InvalidResource
from meshlib.xds import messages as m
from meshlib.xds.decode import decode_node, decode_resource
from meshlib.xds.resource_types import ROUTE


@pytest.mark.parametrize(
    ("route", "field"),
    [
        (
            {"request_headers_to_add": [{"header": {"key": "x-a", "value": "1\r\nx-b: 2"}}]},
            "request_headers_to_add[0].header.value",
        ),
        (
            {"response_headers_to_add": [{"header": {"key": "x-a", "value": "1\0"}}]},
            "response_headers_to_add[0].header.value",
        ),
        (
            {"response_headers_to_add": [{"header": {"key": "x-a", "value": "\u65e5"}}]},
            "response_headers_to_add[0].header.value",
        ),
        (
            {"response_headers_to_add": [{"header": {"key": "x-a: 1\r\nx-b", "value": ""}}]},
            "response_headers_to_add[0].header.key",
        ),
        ({"request_headers_to_remove": ["\u65e5"]}, "request_headers_to_remove[0]"),
        (
            {"request_headers_to_add": [{"header": {"key": "Content-Length", "value": "1"}}]},
            "request_headers_to_add[0].header.key",
        ),
        (
            {"response_headers_to_add": [{"header": {"key": "transfer-encoding"}}]},
            "response_headers_to_add[0].header.key",
        ),
        ({"redirect": {"host_redirect": "a\r\nset-cookie: b"}}, "redirect.host_redirect"),
        ({"redirect": {"path_redirect": "/a\r\nset-cookie: b"}}, "redirect.path_redirect"),
        ({"redirect": {"prefix_rewrite": "/a\n"}}, "redirect.prefix_rewrite"),
        ({"redirect": {"scheme_redirect": "a\r\nb"}}, "redirect.scheme_redirect"),
        ({"route": {"cluster": "c", "prefix_rewrite": "/\u65e5"}}, "route.prefix_rewrite"),
        ({"route": {"cluster": "c", "host_rewrite_literal": "a\r\nb"}}, "route.host_rewrite_literal"),
        (
            {"route": {"cluster": "c", "regex_rewrite": {"pattern": {"regex": "a"}, "substitution": "\n"}}},
            "route.regex_rewrite.substitution",
        ),
    ],
)
def test_what_no_message_may_hold_is_refused_and_not_sent(route: dict[str, Any], field: str) -> None:
    """A line break would be a header, or a request, that nobody configured; framing is the connection's own."""
    action: dict[str, Any] = {} if {"route", "redirect"} & route.keys() else {"direct_response": {"status": 200}}
    given = {"match": {"prefix": "/"}, **action, **route}
    message = m.RouteConfiguration(name="r", virtual_hosts=[{"name": "v", "domains": ["*"], "routes": [given]}])
    with pytest.raises(InvalidResource) as caught:
        decode_resource(ROUTE, message.SerializeToString())
    assert caught.value.field == f"virtual_hosts[0].routes[0].{field}"


@pytest.mark.parametrize("identity", ["a\nERROR b", "\x1b[2J"])
def test_a_node_id_that_would_write_lines_into_logs_is_refused(identity: str) -> None:
    """Ids stand in logs and on terminals."""
    with pytest.raises(InvalidResource) as caught:
        decode_node(m.Node(id=identity))
    assert caught.value.field == "id"
