"""Who does SPIRE say that we are? The SPIFFE Workload API, on the agent's socket, which sends each renewal by itself.

The agent knows a process by its pid, so there is no token and no key on disk. Needs the extra `spiffe`.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")  # see xds/stream.py

import spiffe

from meshlib.identity.credentials import Credentials
from meshlib.identity.pem import BadCredentials, credentials_of
from meshlib.identity.rotation import pause_after

_log = logging.getLogger("meshlib.identity")


class WorkloadApiEnded(Exception):
    """The stream is over; the message says why."""


class WorkloadApiSource:
    """Credentials from the Workload API at `endpoint` (`unix:///run/spire/agent.sock`). A CredentialsSource.

    endpoint: "" is what SPIFFE_ENDPOINT_SOCKET says. The first SVID is this process's (Workload API, 5.3); the bundles
    of federated trust domains are trusted, each for its own.
    """

    def __init__(self, endpoint: str = "", *, rng: random.Random | None = None) -> None:
        self._endpoint, self._rng = endpoint, rng or random.Random()
        self._events: SimpleQueue[Credentials | str] = SimpleQueue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self._events.put("stopped")

    def run(self, publish: Callable[[Credentials], None]) -> None:
        failures, reason = 0, ""
        last: Credentials | None = None
        while not self._stopped.is_set():
            events: SimpleQueue[Credentials | str] = SimpleQueue()  # what the last stream left is not this one's
            self._events = events
            if self._stopped.is_set():
                return
            try:
                for event in self._stream(events):
                    failures = 0
                    if event != last:
                        last = event
                        publish(event)
            except Exception as error:  # the library's, for a socket that is not there, is any of several
                reason = str(error) or type(error).__name__
            if self._stopped.is_set():
                return
            failures += 1
            level = logging.WARNING if failures == 1 else logging.DEBUG
            _log.log(level, "Workload API %s: %s; trying again", self._endpoint or "of the environment", reason)
            self._stopped.wait(pause_after(failures, self._rng))

    def _stream(self, events: SimpleQueue[Credentials | str]) -> Iterator[Credentials]:
        """What one stream brings. Raises WorkloadApiEnded when it ends, and the library's errors."""

        def took(context: Any) -> None:
            events.put(_credentials(context))

        def ended(error: Exception) -> None:
            events.put(str(error) or type(error).__name__)

        with spiffe.WorkloadApiClient(self._endpoint or None) as client:
            stream = client.stream_x509_contexts(took, ended, retry_connect=False)
            try:
                while isinstance(event := events.get(), Credentials):
                    yield event
                raise WorkloadApiEnded(event)
            finally:
                stream.cancel()

    def __repr__(self) -> str:
        return f"<WorkloadApiSource {self._endpoint or 'of the environment'}>"


def _credentials(context: Any) -> Credentials:
    """Raises BadCredentials, which ends the stream."""
    from cryptography.hazmat.primitives import serialization as form

    def pem(certificates: Any) -> bytes:
        return b"".join(each.public_bytes(form.Encoding.PEM) for each in certificates)

    svid = context.default_svid
    # The library keeps a bundle as a set, which has no order; equal bundles must be equal bytes.
    bundles = {
        str(each.trust_domain.name): b"".join(sorted(pem([root]) for root in each.x509_authorities))
        for each in context.x509_bundle_set.bundles
    }
    roots = bundles.pop(str(svid.spiffe_id.trust_domain.name), b"")
    if not roots:
        raise BadCredentials(f"no bundle of {svid.spiffe_id.trust_domain.name} came with the SVID")
    key = svid.private_key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return credentials_of(pem(svid.cert_chain), key, roots, bundles.items())
