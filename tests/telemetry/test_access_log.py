"""Istio's access log: its formats, both directions, and nothing that a caller sends can forge a line."""

from __future__ import annotations

import json
import logging
import re

import httpx
import pytest

from inbound.inbound_servers import uvicorn_server
from meshlib.model import Headers
from meshlib.policy.observer import Served
from meshlib.telemetry.access_log import AccessLog
from meshlib.telemetry.meter import Meter
from meshlib.telemetry.recorder import Recorder
from snapshots import mesh, publish, service
from telemetry.test_both_ends import _asgi

LINE = re.compile(
    r'\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\] "GET /404 HTTP/1\.1" 404 - via_upstream - "-" \d+ \d+ \d+ - "-"'
    r' "probe" "[0-9a-f-]{36}" "127\.0\.0\.1:\d+" "-" inbound\|\d+\|\| - - 127\.0\.0\.1 - default'
)


def test_a_request_is_a_line_of_istios(caplog: pytest.LogCaptureFixture) -> None:
    """In its default text format; what is not known is `-`."""
    caplog.set_level(logging.INFO, "meshlib.access")
    with mesh(service="reviews", access_log="text") as server:
        with uvicorn_server(server.asgi(_asgi)) as url:
            httpx.get(f"{url}/404", trust_env=False, timeout=20, headers={"user-agent": "probe"})
        [record] = [each for each in caplog.records if each.name == "meshlib.access"]
        assert LINE.match(record.getMessage()), record.getMessage()
        assert record.mesh["response_code"] == 404  # type: ignore[attr-defined]


def test_a_call_is_an_object_with_istios_keys(caplog: pytest.LogCaptureFixture) -> None:
    """As JSON, with flags and cluster of a call that reached nobody."""
    caplog.set_level(logging.INFO, "meshlib.access")
    with mesh(service="productpage", access_log="json") as client:
        publish(client, service("reviews:9080", []))
        with client.Client() as http:
            http.get("http://reviews:9080/x?y=1")
    [record] = [each for each in caplog.records if each.name == "meshlib.access"]
    told = json.loads(record.getMessage())
    assert len(told) == 24
    assert (told["response_code"], told["response_flags"], told["path"]) == (503, "UH", "/x?y=1")
    assert (told["upstream_cluster"], told["upstream_host"], told["method"]) == ("reviews:9080", None, "GET")


def test_no_value_ends_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """A header with a line break or a quotation mark stays inside of its own quotation marks."""
    caplog.set_level(logging.INFO, "meshlib.access")
    with mesh() as anybody:
        log = AccessLog(Meter(Recorder(lambda: 0.0), anybody.node), "text", 0.0)
    log.served(Served("GET", "/", Headers([(b"user-agent", b'a"\n[forged] "b')]), 1.0))
    message = caplog.records[-1].getMessage()
    assert "\n" not in message and r'"a\x22\x0a[forged] \x22b"' in message
