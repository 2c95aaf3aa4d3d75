"""How does this process do, as a part of the mesh? What the feed and the identity tell of themselves, for metrics."""

from __future__ import annotations

from typing import NamedTuple


class FeedState(NamedTuple):
    """The conversation with a control plane. is_connected: it answers on the stream that is open. connections: streams
    on which it has answered. accepted, refused: answers, by type (`LDS`). updated: when the last one was accepted, in
    seconds since 1970; 0 is never."""

    is_connected: bool = False
    connections: int = 0
    accepted: tuple[tuple[str, int], ...] = ()
    refused: tuple[tuple[str, int], ...] = ()
    updated: float = 0.0


class HeldCertificate(NamedTuple):
    """One that the process goes by. name: `default` is its own, `ROOTCA` one that it trusts. serial: in hexadecimal.
    not_before, not_after: in seconds since 1970."""

    name: str
    serial: str
    not_before: int
    not_after: int


class ProcessState(NamedTuple):
    """feed: None where the configuration does not come from a control plane. expires: when the certificate does, in
    seconds since 1970; None without one. rotations: certificates after the first. certificates: what it holds now."""

    feed: FeedState | None = None
    expires: float | None = None
    rotations: int = 0
    certificates: tuple[HeldCertificate, ...] = ()
