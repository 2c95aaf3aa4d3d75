"""What is there to measure? The sections of `make bench`, each a module with `measure(effort)`."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """module: of this package. limit: seconds that a full run of it may take; it is ended then."""

    module: str
    title: str
    limit: float


SECTIONS = {
    "policy": Section("policy", "Our own code", 120),
    "items": Section("policy_items", "A call's policy, step by step", 60),
    "picks": Section("picks", "Picks", 120),
    "startup": Section("startup", "Start-up", 180),
    "calls": Section("calls", "HTTP clients", 540),
    "grpc": Section("grpc_calls", "gRPC", 240),
    "mtls": Section("mtls", "New connections", 90),
    "instead": Section("instead", "Sidecars, and libraries by hand", 240),
    "inbound": Section("inbound", "Being called", 120),
    "gateway": Section("gateway", "The gateway", 120),
    "updates": Section("updates", "Changes of configuration", 180),
    "control-plane": Section("control_plane", "The control plane", 330),
}
"""Cheap and undisturbed ones first: what is measured in microseconds should not follow minutes of load."""
