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

    __slots__ = ("_context", "_looked_at", "_stamp", "chain")

    def __init__(self, chain: FilterChain) -> None:
        self.chain = chain
        self._context: ChainContext | None = None
        self._stamp: Stamp | None = None
        self._looked_at = float("-inf")

    def context(self, now: float, recheck: float) -> ChainContext | None:
        """None when there was never a usable pair."""
        if now - self._looked_at >= recheck:
            self._looked_at = now
            tls = self.chain.tls
            assert tls is not None
            stamp = _stamp(tls)  # taken before reading, so that a change while we read is seen the next time
            if stamp != self._stamp:
                self._stamp = stamp
                self._load(tls)
        return self._context

    def _load(self, tls: ListenerTls) -> None:
        context = _new_context()
        try:
            # Without a password function, OpenSSL would ask for an encrypted key's at the terminal.
            context.load_cert_chain(tls.certificate_file, tls.private_key_file, password=lambda: "")
            if tls.mutual:
                context.load_verify_locations(tls.ca_file)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            _log.warning(
                "%s: certificate %s with key %s can't be used, %s: %s",
                self.chain.route_configuration,
                tls.certificate_file,
                tls.private_key_file,
                "the one before stays in force" if self._context else "handshakes are refused",
                error,
            )
            return
        context.set_alpn_protocols(list(tls.alpn))
        context.chain = self.chain
        if self._context is not None:
            _log.info("%s: certificate %s read anew", self.chain.route_configuration, tls.certificate_file)
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
    """Every certificate of one listener, behind one context that asyncio is given."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, recheck: float = RECHECK) -> None:
        self._clock, self._recheck = clock, recheck
        self._by_name: DomainTable[Credential] = DomainTable(())
        self._known: dict[FilterChain, Credential] = {}
        self._refused: tuple[str, ...] = ()
        self.context: ssl.SSLContext = _new_context()
        self.context.sni_callback = self._choose

    def update(self, chains: Iterable[FilterChain]) -> None:
        """Serve these from the next handshake on. `context` may be another one after that."""
        served = [chain for chain in chains if chain.tls is not None]
        self._refused = ()
        mutual = [chain for chain in served if chain.tls is not None and chain.tls.mutual]
        self.context.verify_mode = ssl.CERT_NONE
        if mutual:
            # OpenSSL settles whether to ask for a client's certificate before it tells the SNI name. So a listener
            # asks everyone, with one CA, or no one; what would have to be asked for beside that is not served at all.
            authorities = {chain.tls.ca_file if chain.tls and chain.tls.mutual else "" for chain in served}
            reason = "MUTUAL beside other servers on one port is not supported"
            if len(authorities) == 1:
                try:
                    context = _new_context()
                    context.load_verify_locations(authorities.pop())
                    context.verify_mode = ssl.CERT_REQUIRED
                    context.sni_callback = self._choose
                    self.context, reason = context, ""
                except OSError as error:
                    reason = f"its CA certificates can't be used: {error}"
            if reason:
                self._refused = tuple(f"{chain.route_configuration}: {reason}" for chain in mutual)
                for problem in self._refused:
                    _log.warning("%s", problem)
                served = [chain for chain in served if chain not in mutual]
        self._known = {chain: self._known.get(chain) or Credential(chain) for chain in served}
        self._by_name = DomainTable(
            (name, credential) for chain, credential in self._known.items() for name in chain.server_names or ("*",)
        )
        for credential in self._known.values():
            credential.context(self._clock(), self._recheck)

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each filter chain that can't be served now."""
        unusable = [
            f"{chain.route_configuration}: certificate {chain.tls.certificate_file if chain.tls else ''} can't be used"
            for chain, credential in self._known.items()
            if credential.context(self._clock(), self._recheck) is None
        ]
        return (*self._refused, *unusable)

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        """OpenSSL's question during a handshake. An alert number refuses it: Envoy closes where no chain matches."""
        try:
            credential = self._by_name.find(name or "")
            if credential is None:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            context = credential.context(self._clock(), self._recheck)
            if context is None:
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            connection.context = context
            return None
        except Exception:  # it would end in sys.unraisablehook
            _log.exception("no certificate for %r", name)
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR

    def __repr__(self) -> str:
        return f"<Credentials of {len(self._known)} filter chains>"
