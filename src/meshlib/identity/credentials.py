"""What proves who this process is? Credentials, and the sources that issue and renew them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from meshlib.model import SpiffeId


@dataclass(frozen=True, slots=True)
class Credentials:
    """One key with its certificate, and whom its holder trusts. Replaced whole at each rotation.

    certificate_chain: PEM, the leaf first, without the root. private_key: PEM (PKCS #8, not encrypted), in memory only;
    no repr, log or error shows it. trust_bundles: PEM of the roots by trust domain, sorted; during the rotation of a
    root both stand in one bundle. not_before, not_after: the leaf's, in seconds since 1970.
    """

    identity: SpiffeId
    certificate_chain: bytes = field(repr=False)
    private_key: bytes = field(repr=False)
    trust_bundles: tuple[tuple[str, bytes], ...] = field(repr=False)
    not_before: float
    not_after: float

    def has_expired(self, now: float) -> bool:
        """now: seconds since 1970."""
        return now >= self.not_after


class CredentialsSource(Protocol):
    """Where Credentials come from: our control plane's CA or Istio's, SPIRE, files.

    run: on a thread of its own; calls `publish` with the first Credentials and each renewal until stop(); never raises
    and never gives up: what fails is logged, without secrets, and tried again with back-off.
    stop: from any thread; returns at once.
    """

    def run(self, publish: Callable[[Credentials], None]) -> None: ...
    def stop(self) -> None: ...
