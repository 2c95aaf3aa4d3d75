"""How much may a client ask of a gateway? Every bound in one place, with Envoy's and Istio's defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds. None is no limit.

    head: a request's line and headers, together (Envoy max_request_headers_kb: 60); beyond it, 431.
    headers: how many there may be (Envoy max_headers_count: 100); beyond it, 431.
    body: a request's body; beyond it, 413. Istio has none.
    head_timeout: from the first byte of a head to its last; after it, 408.
    keep_alive: how long a connection may be idle between requests. Shorter than a browser's patience, longer than that
      of the load balancers that stand in front of gateways (60 s), so that they are the ones who close.
    handshake: TLS handshake (Istio's transport_socket_connect_timeout: 15 s).
    drain: how long stop() waits for what is in flight (Istio's terminationDrainDuration: 5 s).
    """

    head: int = 60 * 1024
    headers: int = 100
    body: int | None = None
    head_timeout: float = 60.0
    keep_alive: float = 75.0
    handshake: float = 15.0
    drain: float = 5.0
