"""Who does the control plane say that we are? A key made here, a certificate for it, renewed; and news of the roots."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")  # see xds/stream.py

import grpc
from google.protobuf.message import DecodeError

from meshlib.identity.access import Access
from meshlib.identity.credentials import Credentials
from meshlib.identity.pem import BadCredentials, credentials_of
from meshlib.identity.rotation import pause_after, renew_after
from meshlib.xds import messages as m

_log = logging.getLogger("meshlib.identity")

TIMEOUT = 10.0
CLOCK_INTERVAL = 10.0
"""Seconds between two looks at the wall clock. It can be set, and it goes on while the machine sleeps; certificates end
by it, and waits do not."""
SET_BACK = 60.0
"""Seconds by which the wall clock has to be set back for a certificate to be asked for anew: it may begin later than
it is now. CAs date certificates back by about as much, or more."""
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_UNIMPLEMENTED = "UNIMPLEMENTED"


class CaSource:
    """Credentials from the CA behind `access`: ours, or any that speaks Istio's certificate service. A
    CredentialsSource.

    `access` proves who it is with what was published last.
    lifetime: seconds asked for; 0 leaves it to the CA.
    """

    def __init__(self, access: Access, *, lifetime: int = 0, rng: random.Random | None = None) -> None:
        self._access, self._lifetime = access, lifetime
        self._rng = rng or random.Random()
        self._events: SimpleQueue[bytes | str] = SimpleQueue()
        self._stopped = threading.Event()
        self._credentials: Credentials | None = None
        self._renewed_at = self._renew_at = 0.0
        """Seconds since 1970."""
        self._failures = 0
        self._is_refused = False
        """Whether what was shown last proved nothing to the CA."""

    def stop(self) -> None:
        self._stopped.set()
        self._events.put("stopped")

    def run(self, publish: Callable[[Credentials], None]) -> None:
        while not self._stopped.is_set():
            try:
                reason = self._converse(publish)
            except grpc.RpcError as error:
                call: Any = error
                reason = f"{call.code().name}: {call.details()}{self._advice()}"
                self._is_refused = call.code() is grpc.StatusCode.UNAUTHENTICATED and not self._is_refused
            except (OSError, BadCredentials, DecodeError, ValueError) as error:
                reason = str(error)
            except Exception:
                _log.exception("the identity's source failed")
                reason = "error of the client"
            if self._stopped.is_set():
                return
            self._failures += 1
            level = logging.WARNING if self._failures == 1 else logging.DEBUG
            _log.log(level, "CA %s: %s; trying again", self._access.target, reason)
            self._stopped.wait(pause_after(self._failures, self._rng))

    def _converse(self, publish: Callable[[Credentials], None]) -> str:
        """One connection; returns why it ended. It lives on this thread's stack alone (see xds/stream.py)."""
        events = self._events = SimpleQueue()  # what the last connection left is not this one's
        if self._stopped.is_set():
            return "stopped"
        outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        watch: Any = None
        reader: threading.Thread | None = None
        channel = self._access.channel(_OPTIONS)
        try:
            if self._is_due():
                self._renew(channel, publish)
            method: Any = channel.stream_stream(m.WATCH_TRUST)
            watch = method(_drawn(outgoing), metadata=self._access.metadata())
            outgoing.put(m.serialize(m.TrustBundleRequest()))
            reader = threading.Thread(target=_read, args=(watch, events), name="meshlib-trust", daemon=True)
            reader.start()
            while not self._stopped.is_set():
                event = self._next_event(events)
                if event is None:
                    self._renew(channel, publish)
                elif isinstance(event, bytes):
                    self._trust(event, publish)
                    outgoing.put(m.serialize(m.TrustBundleRequest(version=m.TrustBundle.FromString(event).version)))
                elif not event.startswith(_UNIMPLEMENTED):  # Istio's CA has no such stream
                    return event
            return "stopped"
        finally:
            outgoing.put(None)
            if watch is not None:
                watch.cancel()
            channel.close()
            if reader is not None:
                reader.join(1.0)

    def _is_due(self) -> bool:
        """Also when the clock was set back: what was issued by the old time may begin later than it is now."""
        now = time.time()
        return self._credentials is None or now >= self._renew_at or now < self._renewed_at - SET_BACK

    def _next_event(self, events: SimpleQueue[bytes | str]) -> bytes | str | None:
        """None once a renewal is due."""
        while not self._is_due():
            try:
                return events.get(timeout=min(CLOCK_INTERVAL, max(0.0, self._renew_at - time.time())))
            except Empty:
                pass
        return None

    def _renew(self, channel: Any, publish: Callable[[Credentials], None]) -> None:
        """A new key each time; it is nowhere but in this process' memory."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives import serialization as form
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        request = m.CertificateRequest(
            csr=csr.public_bytes(form.Encoding.PEM).decode(), validity_duration=self._lifetime
        )
        method: Any = channel.unary_unary(m.CREATE_CERTIFICATE)
        answer = m.CertificateResponse.FromString(method(m.serialize(request), timeout=TIMEOUT, metadata=self._shown()))
        if len(answer.cert_chain) < 2:
            raise BadCredentials("the CA's answer is not a certificate and its root")
        *chain, root = (each.encode() for each in answer.cert_chain)
        pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        found = credentials_of(b"".join(chain), pem, root)
        if self._credentials is not None and self._credentials.identity == found.identity:
            # What was told of the roots holds on; the one that came along may be new.
            known = dict(self._credentials.trust_bundles)[found.identity.trust_domain]
            bundle = known if root.strip() in known else known + root
            found = replace(found, trust_bundles=((found.identity.trust_domain, bundle),))
        self._renewed_at = time.time()
        self._renew_at = self._renewed_at + renew_after(found.not_after - self._renewed_at, self._rng)
        self._credentials, self._failures = found, 0
        publish(found)

    def _shown(self) -> tuple[tuple[str, str], ...]:
        """What proves who this is. The CA may have refused a certificate that is good to us, as after clocks were set:
        then a token has its turn, and after that the certificate again."""
        return self._access.metadata(may_join=True, prefers_token=self._is_refused)

    def _advice(self) -> str:
        if self._credentials is None or not self._credentials.has_expired(time.time()):
            return ""
        return (
            " (the certificate has expired, so that a token has to prove who this is; a join token is good for one "
            "join: put a new one into MESHLIB_TOKEN_FILE)"
        )

    def _trust(self, data: bytes, publish: Callable[[Credentials], None]) -> None:
        told = m.TrustBundle.FromString(data)
        assert self._credentials is not None
        if not told.roots or told.trust_domain != self._credentials.identity.trust_domain:
            return
        found = replace(self._credentials, trust_bundles=((told.trust_domain, told.roots.encode()),))
        if found != self._credentials:
            self._credentials = found
            publish(found)

    def __repr__(self) -> str:
        return f"<CaSource {self._access!r} {self._credentials.identity if self._credentials else 'nobody yet'}>"


def _drawn(outgoing: SimpleQueue[bytes | None]) -> Iterator[bytes]:
    while (data := outgoing.get()) is not None:
        yield data


def _read(call: Any, events: SimpleQueue[bytes | str]) -> None:
    try:
        for data in call:
            events.put(data)
        reason = "the CA ended the stream"
    except grpc.RpcError:
        reason = f"{call.code().name}: {call.details()}"
    events.put(reason)
