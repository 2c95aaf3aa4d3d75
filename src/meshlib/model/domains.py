"""Which entry does a host name mean? Envoy's rule for virtual host domains, kept once for everything that asks.

Exact names first, then `*.example.com` (longest first), then `foo.*` (longest first), then `*`; case-insensitive.
https://www.envoyproxy.io/docs/envoy/latest/api-v3/config/route/v3/route_components.proto (VirtualHost.domains)
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class DomainTable(Generic[T]):
    """Immutable lookup by domain. The first entry of a repeated domain wins, as Istio keeps the oldest object."""

    __slots__ = ("_any", "_exact", "_prefixes", "_suffixes")

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        exact: dict[str, T] = {}
        suffixes: dict[str, T] = {}
        prefixes: dict[str, T] = {}
        self._any: T | None = None
        for domain, entry in entries:
            domain = domain.lower()
            if domain == "*":
                self._any = entry if self._any is None else self._any
            elif domain.startswith("*"):
                suffixes.setdefault(domain[1:], entry)
            elif domain.endswith("*"):
                prefixes.setdefault(domain[:-1], entry)
            else:
                exact.setdefault(domain, entry)
        self._exact = exact
        self._suffixes = sorted(suffixes.items(), key=lambda item: -len(item[0]))
        self._prefixes = sorted(prefixes.items(), key=lambda item: -len(item[0]))

    def find(self, host: str) -> T | None:
        """The entry for `host`, or None. A wildcard stands for at least one character."""
        host = host.lower()
        found = self._exact.get(host)
        if found is not None:
            return found
        for suffix, entry in self._suffixes:
            if host.endswith(suffix) and len(host) > len(suffix):
                return entry
        for prefix, entry in self._prefixes:
            if host.startswith(prefix) and len(host) > len(prefix):
                return entry
        return self._any

    def __repr__(self) -> str:
        return f"<DomainTable {len(self._exact)} exact, {len(self._suffixes) + len(self._prefixes)} wildcard>"


def is_loopback(authority: str) -> bool:
    """Whether `host:port` is this machine itself: an address of 127.0.0.0/8, `[::1]`, or `localhost`."""
    host = authority.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
