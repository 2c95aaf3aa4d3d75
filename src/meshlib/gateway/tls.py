"""Which certificate does a client get? That of the filter chain which its SNI name means, as the files are now.

Files are looked at when someone shakes hands, at most once a second. A pair that can't be used is logged once, and the
one before it stays in force; so a renewal that writes the two files one after the other is never seen half done.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from meshlib.gateway.secrets import NotYetKnown, Pem, SecretSource
from meshlib.identity.tls import load_pem
from meshlib.model import DomainTable, FilterChain, ListenerTls

_log = logging.getLogger("meshlib.gateway")

RECHECK = 1.0
"""Seconds between two looks at a certificate's files."""

Stamp = tuple[tuple[int, ...], ...]


class ChainContext(ssl.SSLContext):
    """A server's context that knows its filter chain; None on the one that a handshake begins with."""

    chain: FilterChain | None = None


def _new_context() -> ChainContext:
    context = ChainContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # Istio's default
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


class Credential:
    """One filter chain's certificate, read anew when its files change."""

    __slots__ = ("_context", "_looked_at", "_secrets", "_stamp", "chain")

    def __init__(self, chain: FilterChain, secrets: SecretSource) -> None:
        self.chain, self._secrets = chain, secrets
        self._context: ChainContext | None = None
        self._stamp: Stamp | Pem | None = None
        self._looked_at = float("-inf")

    def context(self, now: float, recheck: float) -> ChainContext | None:
        """None when there was never a usable pair."""
        if now - self._looked_at >= recheck:
            self._looked_at = now
            tls = self.chain.tls
            assert tls is not None
            # Taken before reading, so that a change while we read is seen the next time.
            stamp = self._secret(tls) if tls.credential else _stamp(tls)
            if stamp != self._stamp:
                self._stamp = stamp
                self._load(tls, stamp if isinstance(stamp, Pem) else None)
        return self._context

    def _secret(self, tls: ListenerTls) -> Stamp | Pem | None:
        try:
            return self._secrets.find(tls.credential, roots=tls.mutual or tls.optional) or Pem()
        except NotYetKnown as error:
            _log.debug("%s: %s: %s", self.chain.route_configuration, tls.title, error)
            return self._stamp
        except OSError as error:
            _log.warning("%s: %s can't be read: %s", self.chain.route_configuration, tls.title, error)
            return self._stamp if isinstance(self._stamp, Pem) else Pem()

    def _load(self, tls: ListenerTls, pem: Pem | None) -> None:
        context = _new_context()
        try:
            if pem is None:
                # Without a password function, OpenSSL would ask for an encrypted key's at the terminal.
                context.load_cert_chain(tls.certificate_file, tls.private_key_file, password=lambda: "")
            elif pem.chain and pem.key:
                load_pem(context, pem.chain, pem.key)
            else:
                raise ValueError(f"there is no such secret in {self._secrets!r}, or it has no certificate and key")
            if tls.mutual or tls.optional:
                if pem is None:
                    context.load_verify_locations(tls.ca_file)
                elif pem.roots:
                    context.load_verify_locations(cadata=pem.roots.decode("ascii"))
                else:
                    raise ValueError("the secret has no ca.crt to check clients by")
                context.verify_mode = ssl.CERT_REQUIRED if tls.mutual else ssl.CERT_OPTIONAL
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            _log.warning(
                "%s: certificate %s with key %s can't be used, %s: %s",
                self.chain.route_configuration,
                tls.title,
                tls.private_key_file or "of its own",
                "the one before stays in force" if self._context else "handshakes are refused",
                error,
            )
            return
        context.set_alpn_protocols(list(tls.alpn))
        context.chain = self.chain
        if self._context is not None:
            _log.info("%s: certificate %s read anew", self.chain.route_configuration, tls.title)
        self._context = context


def _stamp(tls: ListenerTls) -> Stamp:
    """What changes when a file does; () for one that is not there."""
    found: list[tuple[int, ...]] = []
    for name in (tls.certificate_file, tls.private_key_file, tls.ca_file):
        try:
            status = Path(name).stat()
            found.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
        except (OSError, ValueError):  # ValueError: a name with a NUL
            found.append(())
    return tuple(found)


class Credentials:
    """Every certificate of one listener. secrets: where those are that have no files."""

    def __init__(
        self, secrets: SecretSource, clock: Callable[[], float] = time.monotonic, recheck: float | None = None
    ) -> None:
        self._secrets, self._clock = secrets, clock
        self._recheck = RECHECK if recheck is None else recheck
        self._by_name: DomainTable[Credential] = DomainTable(())
        self._known: dict[FilterChain, Credential] = {}
        self._refusing = {alert: _refusing(alert) for alert in (_UNKNOWN, _UNUSABLE)}

    def update(self, chains: Iterable[FilterChain]) -> None:
        """Serve these from the next handshake on."""
        served = [chain for chain in chains if chain.tls is not None]
        self._known = {chain: self._known.get(chain) or Credential(chain, self._secrets) for chain in served}
        self._by_name = DomainTable(
            (name, credential) for chain, credential in self._known.items() for name in chain.server_names or ("*",)
        )
        for credential in self._known.values():
            credential.context(self._clock(), self._recheck)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each filter chain that can't be served now."""
        return tuple(
            f"{chain.route_configuration}: certificate {chain.tls.title if chain.tls else ''} can't be used"
            for chain, credential in self._known.items()
            if credential.context(self._clock(), self._recheck) is None
        )

    def context(self, name: str) -> ssl.SSLContext:
        """What to shake hands by with a client that asks for `name`; "" where it says none. One that refuses where no
        chain has that name (Envoy closes, too), or its certificate can't be used."""
        credential = self._by_name.find(name)
        if credential is None:
            return self._refusing[_UNKNOWN]
        return credential.context(self._clock(), self._recheck) or self._refusing[_UNUSABLE]

    def __repr__(self) -> str:
        return f"<Credentials of {len(self._known)} filter chains>"


_UNKNOWN = ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
_UNUSABLE = ssl.ALERT_DESCRIPTION_INTERNAL_ERROR


def _refusing(alert: int) -> ssl.SSLContext:
    context = _new_context()
    context.sni_callback = lambda *_: alert
    return context
