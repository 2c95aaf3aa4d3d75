"""How busy does a server say it is? An ORCA load report (xds.data.orca.v3.OrcaLoadReport) from a response header.

`endpoint-load-metrics: TEXT cpu_utilization=0.3, rps_fractional=120` or `JSON {...}` or `BIN <base64>`, and
`endpoint-load-metrics-bin: <base64>`, as Envoy and gRPC write it. A report that can't be read is no report: it comes
from a server, and no call may fail by it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from typing import Any, NamedTuple

from meshlib.model import HeaderView

HEADER, BINARY_HEADER = "endpoint-load-metrics", "endpoint-load-metrics-bin"
_NUMBERS = {1: "cpu_utilization", 6: "rps_fractional", 7: "eps", 9: "application_utilization"}
"""Field numbers of OrcaLoadReport; all are doubles."""
_CAMEL = {name: name[0] + name.title().replace("_", "")[1:] for name in _NUMBERS.values()}


class LoadReport(NamedTuple):
    """Utilizations as shares of 1 (they may exceed it); qps and eps a second."""

    cpu_utilization: float = 0.0
    application_utilization: float = 0.0
    qps: float = 0.0
    eps: float = 0.0


def read(headers: HeaderView) -> LoadReport | None:
    """What the response says, None when it says nothing that can be used."""
    text = headers.get(HEADER)
    binary = None
    if text is None:
        binary = headers.get(BINARY_HEADER)
        if binary is None:
            return None
    try:
        if text is None:
            assert binary is not None
            values = _from_binary(binary)
        else:
            form, _, rest = text.strip().partition(" ")
            values = _READERS[form](rest)
        found = {name: float(values.get(name, 0.0)) for name in _NUMBERS.values()}
    except (KeyError, ValueError, TypeError, AttributeError, binascii.Error, struct.error):
        return None
    if not all(math.isfinite(number) and number >= 0 for number in found.values()):
        return None
    return LoadReport(found["cpu_utilization"], found["application_utilization"], found["rps_fractional"], found["eps"])


def _from_text(text: str) -> dict[str, Any]:
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() in _NUMBERS.values()}


def _from_json(text: str) -> dict[str, Any]:
    """Names as in the .proto or in camel case: protobuf's JSON knows both."""
    given = json.loads(text)
    return {name: given.get(name, given.get(_CAMEL[name], 0.0)) for name in _NUMBERS.values()}


def _from_binary(text: str) -> dict[str, Any]:
    data = base64.b64decode(text.strip() + "=" * (-len(text.strip()) % 4), validate=True)
    found: dict[str, Any] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 1:
            if number in _NUMBERS:
                found[_NUMBERS[number]] = struct.unpack_from("<d", data, at)[0]
            at += 8
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            at += length
        elif kind == 5:
            at += 4
        else:
            raise ValueError(f"wire type {kind}")
    if at != len(data):
        raise ValueError("cut short")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


_READERS = {"TEXT": _from_text, "JSON": _from_json, "BIN": _from_binary}
