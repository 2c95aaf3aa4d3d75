"""Is what a caller proves itself by kept out of paths that are written down?"""

from __future__ import annotations

import logging

import pytest

from meshlib.model import Headers
from meshlib.policy.observer import Served
from meshlib.telemetry.access_log import AccessLog
from meshlib.telemetry.meter import Meter
from meshlib.telemetry.recorder import Recorder
from meshlib.telemetry.scrub import scrubbed
from snapshots import mesh


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("/a", "/a"),
        ("/a?b=1", "/a?b=1"),
        ("/a?access_token=S3CRET&b=1", "/a?access_token=REDACTED&b=1"),
        ("/a?b=1&Token=S3CRET", "/a?b=1&Token=REDACTED"),
        ("access_token=S3CRET", "access_token=REDACTED"),
        ("/a?x-amz-security-token=S3CRET;sig=S3CRET", "/a?x-amz-security-token=REDACTED;sig=REDACTED"),
        ("/a?monkey=1&keys=2&tokens=3", "/a?monkey=1&keys=2&tokens=3"),
        ("/token=x", "/token=x"),
    ],
)
def test_values_of_credentials_are_left_out(path: str, written: str) -> None:
    """By the parameter's whole name; everything else stays as it was sent."""
    assert scrubbed(path) == written


def test_the_access_log_has_no_token(caplog: pytest.LogCaptureFixture) -> None:
    """Of a request that brought it in its query."""
    caplog.set_level(logging.INFO, "meshlib.access")
    with mesh() as anybody:
        log = AccessLog(Meter(Recorder(lambda: 0.0), anybody.node), "text", 0.0)
    log.served(Served("GET", "/a?access_token=S3CRET", Headers([]), 1.0))
    assert "S3CRET" not in caplog.text
    assert "/a?access_token=REDACTED" in caplog.text
