"""How is the admin API reached from elsewhere? TLS with our own certificate; clients may show theirs."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from typing import Any

from meshlib.controlplane.own_identity import OwnIdentity
from meshlib.identity.pem import credentials_of
from meshlib.identity.tls import load_credentials

logger = logging.getLogger("meshlib.controlplane.access")


def admin_context(
    own: OwnIdentity, roots: Callable[[], bytes], on_change: Callable[[Callable[[], None]], None]
) -> ssl.SSLContext:
    """A context for a server that renews its certificate by itself. roots: PEM of those whose clients' certificates are
    looked at; more are added as they come, and whether a root still counts is asked for each request. on_change: is
    given what wants to be called when the mesh's roots have changed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # a resumed session would bring the certificate of before
    context.options |= ssl.OP_NO_TICKET
    context.set_alpn_protocols(["http/1.1"])
    known = b""

    def refresh() -> None:
        nonlocal known
        now = roots()
        if now != known:
            context.load_verify_locations(cadata=now.decode("ascii"))
            known = now
        if (fresh := own.if_due()) is not None:
            chain, key = fresh
            load_credentials(context, credentials_of(chain, key, now))

    def try_to() -> None:
        try:
            refresh()
        except (OSError, ValueError):
            logger.exception("the admin API's certificate can't be renewed")

    def before_each(connection: Any, name: str | None, used: ssl.SSLContext) -> None:
        """What is loaded now counts from the next handshake on: certificates are renewed at half of their time."""
        try_to()

    refresh()
    on_change(try_to)
    context.sni_callback = before_each
    return context
