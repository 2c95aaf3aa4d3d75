"""How does a call look to a limit? LimitKeys and the conditions of limits, compiled into plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meshlib.model import DomainTable, HeaderMatch, LimitKey, Peer, Quota, RateLimit, Request
from meshlib.model.expressions import compile_string
from meshlib.policy.matching import compile_header

Read = Callable[[Request, Peer | None], str | None]
Concerns = Callable[[Request, Peer | None], bool]
Descriptor = tuple[tuple[str, str], ...]
"""Entries of key and value, as a rate limit service is told them."""


def compile_concerns(limit: RateLimit | Quota) -> Concerns | None:
    """Whether a call is one that the limit is for; None when all are."""
    parts: list[Concerns] = []
    if limit.methods:
        methods = frozenset(limit.methods)
        parts.append(lambda request, _: request.method in methods)
    if limit.path_prefix:
        prefix = limit.path_prefix
        parts.append(lambda request, _: request.path.startswith(prefix))
    if limit.port:
        port = limit.port
        parts.append(lambda _, peer: peer is not None and peer.local_port in (0, port))
    if limit.hosts:
        hosts = DomainTable((host, True) for host in limit.hosts)
        parts.append(lambda request, _: hosts.find(_host(request.authority)) is not None)
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else lambda request, peer: all(part(request, peer) for part in parts)


def _host(authority: str) -> str:
    host, _, port = authority.rpartition(":")
    return host if host and port.isdigit() else authority


def compile_key(key: LimitKey) -> Read:
    """What a call has for one key; None when it has nothing, or not what is asked for."""
    if key.kind == "match":
        return _compile_match(key)
    if key.kind == "value":
        return lambda _request, _peer: key.value
    read = _reader(key)
    if not key.value:
        return read
    wanted = key.value
    return lambda request, peer: wanted if read(request, peer) == wanted else None


def _reader(key: LimitKey) -> Read:
    name = key.name
    if key.kind == "header":
        if name in _PSEUDO:
            attribute = _PSEUDO[name]
            return lambda request, _: getattr(request, attribute) or None
        return lambda request, _: request.headers.get(name) or None
    if key.kind == "principal":
        return lambda _, peer: peer.identity.uri if peer is not None and peer.identity is not None else None
    if key.kind == "address":
        return lambda _, peer: (peer.remote or peer.address or None) if peer is not None else None
    if key.kind == "method":
        return lambda request, _: request.method
    return lambda request, _: request.path.partition("?")[0]


_PSEUDO = {":path": "path", ":method": "method", ":authority": "authority", ":scheme": "scheme"}


def _compile_match(key: LimitKey) -> Read:
    fits = [_compile_header(each) for each in key.headers]
    wanted = not key.invert
    return lambda request, _: key.value if all(each(request) for each in fits) is wanted else None


def _compile_header(match: HeaderMatch) -> Callable[[Request], bool]:
    if match.name not in _PSEUDO:
        holds = compile_header(match)
        return lambda request: holds(request.headers)
    attribute, fits = _PSEUDO[match.name], compile_string(match.match)
    return lambda request: fits(getattr(request, attribute)) is not match.invert


class Describe:
    """A descriptor compiled. Called with a call, gives its entries; None when the call lacks one of them."""

    __slots__ = ("_entries",)

    def __init__(self, keys: Iterable[LimitKey]) -> None:
        self._entries = tuple((key.entry or key.name or key.kind, compile_key(key), key.optional) for key in keys)

    def __call__(self, request: Request, peer: Peer | None) -> Descriptor | None:
        found = []
        for name, read, optional in self._entries:
            value = read(request, peer)
            if value is not None:
                found.append((name, value))
            elif not optional:
                return None
        return tuple(found)
