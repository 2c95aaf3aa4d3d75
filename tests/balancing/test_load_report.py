"""What a server says of its load is read in every form, and never fails a call."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xds.data.orca.v3 import orca_load_report_pb2 as orca  # type: ignore[import-not-found]

from meshlib.balancing.load_report import LoadReport, read
from meshlib.model import Headers

EXPECTED = LoadReport(0.25, 0.5, 120.0, 3.0)
MESSAGE = orca.OrcaLoadReport(
    cpu_utilization=0.25,
    mem_utilization=0.9,
    request_cost={"db": 1.5},
    rps_fractional=120,
    eps=3,
    application_utilization=0.5,
)


def header(name: str, value: str) -> Headers:
    return Headers([(name.encode(), value.encode("latin-1"))])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "endpoint-load-metrics",
            "TEXT cpu_utilization=0.25, mem_utilization=0.9, rps_fractional=120, eps=3,application_utilization=0.5",
        ),
        (
            "endpoint-load-metrics",
            'JSON {"cpu_utilization": 0.25, "rpsFractional": 120, "eps": 3, "applicationUtilization": 0.5}',
        ),
        ("endpoint-load-metrics", "BIN " + base64.b64encode(MESSAGE.SerializeToString()).decode()),
        ("endpoint-load-metrics-bin", base64.b64encode(MESSAGE.SerializeToString()).decode().rstrip("=")),
    ],
)
def test_every_form_is_read(name: str, value: str) -> None:
    """As Envoy and gRPC write them; the binary ones come from the published message."""
    assert read(header(name, value)) == EXPECTED


@pytest.mark.parametrize(
    "value", ["", "TEXT eps=x", "JSON [1]", "JSON {", "BIN !!", "CSV 1,2", "TEXT eps=nan", "TEXT eps=-1", "BIN DQ=="]
)
def test_what_cannot_be_read_is_no_report(value: str) -> None:
    """Also numbers that are none."""
    assert read(header("endpoint-load-metrics", value)) is None
    assert read(Headers()) is None


@given(st.sampled_from(["TEXT ", "JSON ", "BIN ", ""]), st.text(st.characters(max_codepoint=255)))
def test_nothing_raises(form: str, text: str) -> None:
    """A header comes from a server that may be anyone's."""
    read(header("endpoint-load-metrics", form + text))
    read(header("endpoint-load-metrics-bin", text))


@given(st.binary())
def test_no_bytes_raise(data: bytes) -> None:
    """The binary form, cut and garbled."""
    read(header("endpoint-load-metrics-bin", base64.b64encode(data).decode()))
