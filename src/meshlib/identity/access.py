"""How does a process reach the control plane, and prove there who it is? TLS, and a token for each call."""

from __future__ import annotations

import hashlib
import itertools
import random
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meshlib.identity.credentials import Credentials
from meshlib.identity.proof import prove
from meshlib.model import is_loopback

JOIN_PREFIX = "mjt_"
TIMEOUT = 5.0
CONNECT_TIMEOUT_MS = 5_000
"""For one of several addresses: gRPC alone gives a machine that is gone 20 s, while another would answer."""


class NoAccess(OSError):
    """There is nothing to reach the control plane with. The message holds no secret."""


class Access:
    """One control plane, from one process. Thread-safe.

    target: `host:port`, or those of several replicas, separated by commas: each channel is to the next one, beginning
      anywhere, so that a mesh spreads over them and whoever loses one tries another.
    roots_file: PEM of those who may vouch for it; a join token names its root by itself. token_file: a token, read at
      each use: a platform renews it. credentials: the present ones. headers: further metadata of each call.
    """

    def __init__(
        self,
        target: str,
        roots_file: Path | None = None,
        token_file: Path | None = None,
        credentials: Callable[[], Credentials | None] = lambda: None,
        rng: random.Random | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.target = target
        self._targets = addresses_of(target)
        self._turn = itertools.count((rng or random.Random()).randrange(len(self._targets)))
        self._roots_file, self._token_file, self._credentials = roots_file, token_file, credentials
        self._headers = headers
        self._pinned: bytes | None = None

    @property
    def is_secure(self) -> bool:
        """Whether TLS is spoken; without, only this machine's own control plane is called."""
        return self._roots_file is not None or self._token().startswith(JOIN_PREFIX) or self._pinned is not None

    def channel(self, options: Sequence[tuple[str, Any]]) -> Any:
        """A grpc.Channel. Blocks up to a few seconds the first time, for a join token's root.

        Raises NoAccess, OSError.
        """
        import grpc

        target = self._targets[next(self._turn) % len(self._targets)]
        if len(self._targets) > 1:
            options = (*options, ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS))
        if not self.is_secure:
            if not is_loopback(target):
                raise NoAccess(
                    f"control plane {target}: plaintext is for this machine only; "
                    "give its root in MESHLIB_CA_ROOTS, or a join token in MESHLIB_TOKEN_FILE"
                )
            return grpc.insecure_channel(target, options=options)
        return grpc.secure_channel(
            target, grpc.ssl_channel_credentials(root_certificates=self._roots(target)), options=options
        )

    def metadata(
        self, *, may_join: bool = False, often: bool = False, prefers_token: bool = False
    ) -> tuple[tuple[str, str], ...]:
        """The `authorization` of one call and what goes with it, () when there is nothing to show. A platform's token
        comes first, since it is renewed by others; a certificate is shown where there is none, and a join token where
        there is neither.

        often: the call is one of many, and should not have the platform asked each time: the certificate comes first.
        prefers_token: the certificate was refused; a join token, where it may be shown and there is one, comes first.
        """
        shown = self._shown(may_join, often, prefers_token)
        return (("authorization", f"Bearer {shown}"), *self._headers) if shown else ()

    def _shown(self, may_join: bool, often: bool, prefers_token: bool) -> str:
        token = self._token()
        credentials, now = self._credentials(), time.time()
        has_certificate = credentials is not None and not credentials.has_expired(now)
        if token and not (often and has_certificate) and not token.startswith(JOIN_PREFIX):
            return token
        if token and may_join and prefers_token:
            return token
        if credentials is not None and has_certificate:
            return prove(credentials, now)
        return token if may_join else ""

    def _token(self) -> str:
        try:
            return self._token_file.read_text().strip() if self._token_file is not None else ""
        except OSError:
            return ""  # who has a certificate goes on without; who has not is refused, and tries again

    def _roots(self, target: str) -> bytes:
        """Those of the file or the token, and those that were learned since: after a rotation the first are old."""
        found = self._roots_file.read_bytes() if self._roots_file is not None else b""
        if not found:
            if self._pinned is None and (token := self._token()).startswith(JOIN_PREFIX):
                self._pinned = pinned_root(target, token.rpartition(".")[2])
            found = self._pinned or b""
        credentials = self._credentials()
        learned = dict(credentials.trust_bundles).get(credentials.identity.trust_domain) if credentials else b""
        return found + b"\n" + (learned or b"")

    def __repr__(self) -> str:
        return f"<Access {self.target} {'TLS' if self.is_secure else 'plaintext'}>"


def pinned_root(target: str, sha256: str) -> bytes:
    """PEM of the root in the chain that the server at `target` shows whose SHA-256 this is. Nothing is sent to it.

    Raises NoAccess for a server that has no such root.
    """
    host, _, port = target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT) as connection,
        context.wrap_socket(connection, server_hostname=host.strip("[]")) as secured,
    ):
        get_chain = getattr(secured, "get_unverified_chain", None)  # public from Python 3.13 on
        if get_chain is not None:
            chain = list(get_chain())
        else:
            chain = [each.public_bytes(2) for each in secured._sslobj.get_unverified_chain()]  # type: ignore[attr-defined]
    for der in chain:
        if hashlib.sha256(der).hexdigest() == sha256:
            return ssl.DER_cert_to_PEM_cert(der).encode()
    raise NoAccess(
        f"control plane {target} is not the one that made the join token: its root is another; make a token there "
        "(meshctl token create), or name the right one in MESHLIB_CONTROL_PLANE"
    )


def addresses_of(target: str) -> tuple[str, ...]:
    """`a:15012, b:15012` -> each of them; a control plane has one address, or one for each replica."""
    return tuple(part for each in target.split(",") if (part := each.strip())) or (target,)
