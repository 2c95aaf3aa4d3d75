"""Who is the control plane itself? A certificate of its own CA, with the names by which it is called, kept fresh."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import grpc

from meshlib.controlplane.ca import BACKDATED, DEFAULT_LIFETIME, CertificateAuthority
from meshlib.model import SpiffeId

if TYPE_CHECKING:
    Configuration = Any

NAMES = ("localhost", "meshlib.istio-system.svc", "istiod.istio-system.svc")
ADDRESSES = ("127.0.0.1", "::1")


class OwnIdentity:
    """names: DNS names and addresses besides the usual ones; the unspecified address counts as none. clock: seconds
    since 1970."""

    def __init__(
        self, authority: CertificateAuthority, names: Iterable[str], clock: Callable[[], float] = time.time
    ) -> None:
        self._authority, self._clock = authority, clock
        self._identity = SpiffeId.of(authority.trust_domain, "istio-system", "meshlib")
        dns, addresses = (
            dict.fromkeys((*NAMES, socket.gethostname())),
            dict.fromkeys(map(ipaddress.ip_address, ADDRESSES)),
        )
        for name in names:
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(name)
                if not address.is_unspecified:
                    addresses[address] = None
                continue
            dns[name] = None
        self._dns, self._addresses = tuple(dns), tuple(addresses)
        self._lock = threading.Lock()
        self._made = ("", 0.0, 0.0)
        """The signer, and between which times (seconds since 1970) what it signed is good."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its certificate, in lower case."""
        return tuple(name.lower() for name in (*self._dns, *map(str, self._addresses)))

    def server_credentials(self) -> grpc.ServerCredentials:
        """No client certificates: see meshlib.identity.proof."""
        first = self.if_due()
        assert first is not None
        fetch: Any = self._configuration  # it may say None, whatever the stub of its type says
        return grpc.dynamic_ssl_server_credentials(_configured(*first), fetch, require_client_authentication=False)

    def if_due(self) -> tuple[bytes, bytes] | None:
        """(chain, key) as PEM, where there is reason for new ones: half of their time, another root, a clock that was
        set back to before they begin. Thread-safe."""
        with self._lock:
            version, begin, until = self._made
            now = self._clock()
            if version == self._authority.signing and begin <= now < until:
                return None
            version = self._authority.signing
            chain, key = self._authority.issue_own(self._identity, self._dns, self._addresses)
            self._made = (version, now - BACKDATED, now + DEFAULT_LIFETIME / 2)
            return chain, key

    def _configuration(self) -> Configuration | None:
        """Called by gRPC's threads before each handshake; None is no change."""
        fresh = self.if_due()
        return None if fresh is None else _configured(*fresh)


def _configured(chain: bytes, key: bytes) -> Configuration:
    return grpc.ssl_server_certificate_configuration([(key, chain)])
