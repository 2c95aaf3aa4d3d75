"""Who is who? SPIFFE identities, and the peer at the other end of an inbound connection."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Self

# SPIFFE ID specification, 2.1: a trust domain is made of lower-case letters, digits, dots, dashes and underscores; a
# path segment of letters, digits, dots, dashes and underscores, and is neither empty nor "." nor "..".
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_SCHEME = "spiffe://"
MAX_SPIFFE_ID = 2048
"""Bytes; SPIFFE ID specification, 2.3."""


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """`spiffe://<trust domain>/<path>`; a workload's path in Istio's mesh is `ns/<namespace>/sa/<service account>`.

    namespace, service_account: "" where the path has another form.
    """

    trust_domain: str
    path: str

    @classmethod
    def of(cls, trust_domain: str, namespace: str, service_account: str) -> Self:
        return cls(trust_domain, f"ns/{namespace}/sa/{service_account}")

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises ValueError, saying what is wrong, for what is no SPIFFE ID."""
        if len(uri) > MAX_SPIFFE_ID or not uri.startswith(_SCHEME):
            raise ValueError(f"no SPIFFE ID: {uri[:200]!r}")
        trust_domain, _, path = uri[len(_SCHEME) :].partition("/")
        if not _TRUST_DOMAIN.fullmatch(trust_domain):
            raise ValueError(f"SPIFFE ID {uri[:200]!r} has no valid trust domain")
        if any(not _SEGMENT.fullmatch(part) or part in (".", "..") for part in path.split("/")):
            raise ValueError(f"SPIFFE ID {uri[:200]!r} has no valid path")
        return cls(trust_domain, path)

    @property
    def uri(self) -> str:
        return f"{_SCHEME}{self.trust_domain}/{self.path}"

    @property
    def principal(self) -> str:
        """As AuthorizationPolicy writes it: `cluster.local/ns/default/sa/reviews`."""
        return f"{self.trust_domain}/{self.path}"

    @property
    def namespace(self) -> str:
        return self._parts()[0]

    @property
    def service_account(self) -> str:
        return self._parts()[1]

    def _parts(self) -> tuple[str, str]:
        match self.path.split("/"):
            case ["ns", namespace, "sa", account]:
                return namespace, account
            case _:
                return "", ""

    def __str__(self) -> str:
        return self.uri


class Peer(NamedTuple):
    """Who is at the other end of an inbound connection, as the connection itself proves it; never from a header.

    identity: verified by the handshake; None for plaintext, or TLS without a client certificate.
    address: the TCP peer's IP address, "" when unknown. local_port: the port it was accepted on, 0 when unknown.
    sni: the server name that it asked for. local_address: the IP address it was accepted on, "" when unknown.
    remote: the client's address as trusted proxies name it, where the edge has worked it out (a gateway, which knows
    how many there are); "" leaves it to the rules.
    """

    identity: SpiffeId | None = None
    is_tls: bool = False
    address: str = ""
    local_port: int = 0
    sni: str = ""
    local_address: str = ""
    remote: str = ""


UNKNOWN_PEER = Peer()
