"""What is to be measured, and where does it go? Read from the settings and OpenTelemetry's own variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from meshlib.errors import SettingsError

OFF = "off"
CONTROL_PLANE = "control-plane"


class Setup(NamedTuple):
    """target: host:port of an OTLP/gRPC receiver, or the URL of an OTLP/HTTP one; "" pushes nothing.

    secure: TLS for gRPC. interval: seconds between two pushes. prometheus: host and port to be scraped
    on; None is none. strict: write only what Istio's proxies know. sampling: percent of new traces.
    access_log: `text`, `json`, or "" for none. keeps_lines: lines of logs are pushed, too: to a control plane, never to
    a receiver of somebody else's, who has not asked for them.
    """

    target: str = ""
    secure: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    interval: float = 10.0
    prometheus: tuple[str, int] | None = None
    strict: bool = False
    sampling: float = 1.0
    access_log: str = ""
    keeps_lines: bool = False

    @property
    def is_on(self) -> bool:
        return bool(self.target or self.prometheus or self.access_log)


def target_of(telemetry: str, control_plane: str, environ: Mapping[str, str] | None = None) -> Setup:
    """Where metrics and spans go: MESHLIB_TELEMETRY, else OTEL_EXPORTER_OTLP_ENDPOINT, else the control plane that
    this process has at host:port. Raises SettingsError for a URL that can't be used."""
    environ = os.environ if environ is None else environ
    if telemetry == OFF or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Setup()
    url = telemetry if telemetry not in ("", CONTROL_PLANE) else ""
    if not telemetry:
        url = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not url:
        is_address = control_plane.rpartition(":")[2].isdigit() and not os.path.isdir(control_plane)  # noqa: PTH112
        if telemetry == CONTROL_PLANE and not is_address:
            raise SettingsError(
                f"telemetry {CONTROL_PLANE!r}: there is no control plane at host:port: set "
                "MESHLIB_CONTROL_PLANE to one, or telemetry to off"
            )
        return Setup(target=control_plane if is_address else "", keeps_lines=is_address)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"telemetry {url!r}: is neither off, control-plane nor the http(s) URL of an OTLP receiver")
    headers = tuple(
        (name.strip().lower(), value.strip())
        for name, mark, value in (
            each.partition("=") for each in environ.get("OTEL_EXPORTER_OTLP_HEADERS", "").split(",")
        )
        if mark
    )
    protocol = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    if protocol.startswith("http/") or (not protocol and parts.port == 4318):  # OTLP's own port for HTTP
        return Setup(target=url, headers=headers)
    return Setup(target=parts.netloc.rpartition("@")[2], secure=parts.scheme == "https", headers=headers)
