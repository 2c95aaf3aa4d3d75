"""What does the name server say? The feed of a process that has DNS and nothing else, as for headless services.

A host is looked up when it is first called and from then on in the background, before its records expire: no call waits
for a name server again. What was last known serves for as long as none answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver

from meshlib.discovery.hosts import HostsSource
from meshlib.model import Endpoint
from meshlib.model.values import dataclass

_log = logging.getLogger("meshlib.discovery")

RESOLV_CONF = Path("/etc/resolv.conf")

MAX_QUERIES = 32
"""At a time, of one process."""
MAX_ALIASES = 8
"""CNAMEs that are followed one after the other where the name server does not follow them itself."""
MAX_TARGETS = 64
"""Of a SRV record set."""

REFRESH = 0.9
"""Part of a TTL after which records are looked up anew, up to a tenth earlier: never expired, never all at once."""
MIN_TTL, MAX_TTL, MAX_NEGATIVE_TTL = 1.0, 3600.0, 30.0
"""Seconds. A service that starts should be found sooner than zones' negative TTLs (often an hour) say."""
RETRY_FIRST, RETRY_MAX = 1.0, 30.0
"""Seconds between tries while no name server answers."""
LIFETIME, MAX_LIFETIME = 5.0, 30.0
"""Seconds for one question, all name servers and repetitions together: where resolv.conf says neither `timeout` nor
`attempts`, and at most. (glibc has 5 s and two attempts for each server, which is longer than a call would wait.)"""
ATTEMPTS, MAX_ATTEMPTS = 2, 5
"""How often each name server is asked, as in resolv.conf(5)."""


class _Unanswered(Exception):
    """No name server gave an answer that counts."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """endpoints: sorted; () where there is no such name. ttl: seconds."""

    endpoints: tuple[Endpoint, ...]
    ttl: float


class DnsSource(HostsSource):
    """Feed of one process from name servers. A Source.

    server: address and port of the name server; default those of `resolv_conf`, which also says the search domains and
    of its options ndots, timeout, attempts and rotate. It is read when the feed starts.

    `host:port` is the host's A records, or its AAAA records where it has no A, at that port. A host that begins with an
    underscore (`_http._tcp.reviews`) is its SRV records, which say ports, priorities and weights.
    """

    name = "dns"

    def __init__(
        self,
        server: tuple[str, int] | None = None,
        *,
        resolv_conf: Path = RESOLV_CONF,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__()
        self._server = server
        self._resolv_conf = resolv_conf
        self._rng = rng or random.Random()

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[object]:
        self._queries = asyncio.Semaphore(MAX_QUERIES)
        self._resolver = self._make_resolver()
        yield None

    def _make_resolver(self) -> dns.asyncresolver.Resolver:
        try:
            resolver = dns.asyncresolver.Resolver(str(self._resolv_conf))
        except (dns.exception.DNSException, OSError) as error:
            if self._server is None:
                _log.warning("%s can't be used, so the name server is 127.0.0.1: %s", self._resolv_conf, error)
            resolver = dns.asyncresolver.Resolver(configure=False)
            resolver.nameservers = ["127.0.0.1"]
            resolver.search = []
        if self._server is not None:
            resolver.nameservers, resolver.port = [self._server[0]], self._server[1]
        options = _options(self._resolv_conf)
        resolver.lifetime = LIFETIME
        if options.keys() & {"timeout", "attempts"}:
            attempts = min(MAX_ATTEMPTS, options.get("attempts") or ATTEMPTS)
            resolver.timeout = min(resolver.timeout, MAX_LIFETIME)
            resolver.lifetime = min(MAX_LIFETIME, resolver.timeout * attempts * max(1, len(resolver.nameservers)))
        return resolver

    async def _keep(self, authority: str) -> None:
        host, _, port = authority.rpartition(":")
        name = _name(host)
        if name is None or not port.isdecimal():
            self._answered(authority, None)
            return
        failures = 0
        while True:
            try:
                answer = await self._look_up(name, host, int(port))
            except _Unanswered as error:
                pause = min(RETRY_MAX, RETRY_FIRST * 2**failures) * self._rng.uniform(0.5, 1.0)
                failures = min(failures + 1, 10)
                if failures == 1:
                    known = (
                        "what was last known of it stays" if authority in self._answers else "nothing is known of it"
                    )
                    _log.warning("no name server answers about %s, %s: %s", host, known, error)
            except Exception:
                # A defect of ours or of the library; what was known stays, and it gets another chance.
                _log.exception("%s can't be looked up", host)
                pause = RETRY_MAX
            else:
                if failures:
                    _log.info("name servers answer about %s again", host)
                failures = 0
                self._answered(authority, answer.endpoints or None)
                pause = max(MIN_TTL, answer.ttl * REFRESH) * self._rng.uniform(0.9, 1.0)
            await asyncio.sleep(pause)

    # Questions. Each raises _Unanswered.

    async def _look_up(self, name: dns.name.Name, host: str, port: int) -> _Answer:
        """The first of the names that `host` may mean which has records."""
        negative = MAX_NEGATIVE_TTL
        for candidate in self._candidates(name):
            if host.startswith("_"):
                answer = await self._services(candidate)
            else:
                answer = await self._addresses(candidate, port)
            if answer.endpoints:
                return _Answer(answer.endpoints, min(answer.ttl, MAX_TTL))
            negative = min(negative, answer.ttl)
        return _Answer((), negative)

    def _candidates(self, name: dns.name.Name) -> Iterator[dns.name.Name]:
        """As resolv.conf(5) says: a name with fewer dots than ndots is tried below the search domains first."""
        absolute = name.derelativize(dns.name.root)
        if name.is_absolute():
            yield absolute
            return
        is_full = len(name) - 1 >= (1 if self._resolver.ndots is None else self._resolver.ndots)
        if is_full:
            yield absolute
        for domain in self._resolver.search:
            try:
                yield name.concatenate(domain)
            except dns.name.NameTooLong:
                continue
        if not is_full:
            yield absolute

    async def _addresses(self, name: dns.name.Name, port: int) -> _Answer:
        # One family, as Envoy has it: the pods of a dual stack service stand in both, and would count twice.
        records, ttl = await self._ask(name, dns.rdatatype.A)
        if records == []:
            records, other = await self._ask(name, dns.rdatatype.AAAA)
            ttl = other if records else min(ttl, other)
        return _Answer(tuple(sorted({Endpoint(record.address, port) for record in records or ()})), ttl)

    async def _services(self, name: dns.name.Name) -> _Answer:
        records, ttl = await self._ask(name, dns.rdatatype.SRV)
        # A target "." says that there is no such service (RFC 2782).
        records = sorted(
            (each for each in records or () if each.target != dns.name.root), key=lambda each: each.priority
        )
        records = records[:MAX_TARGETS]
        # Envoy's priorities have no gaps.
        ranks = {priority: rank for rank, priority in enumerate(sorted({each.priority for each in records}))}
        found = await asyncio.gather(*(self._addresses(each.target, each.port) for each in records))
        endpoints = {
            Endpoint(each.address, each.port, max(1, record.weight), priority=ranks[record.priority])
            for record, target in zip(records, found, strict=True)
            for each in target.endpoints
        }
        return _Answer(tuple(sorted(endpoints)), min([ttl, *(target.ttl for target in found)]))

    async def _ask(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> tuple[list[Any] | None, float]:
        """The records, [] where there are none of this kind and None where there is no such name, and for how many
        seconds that holds."""
        ttl = MAX_TTL
        for _ in range(MAX_ALIASES):
            try:
                async with self._queries:
                    answer = await self._resolver.resolve(name, kind, raise_on_no_answer=False, search=False)
            except dns.resolver.NXDOMAIN as error:
                said: dns.message.QueryMessage = error.response(name)  # type: ignore[no-untyped-call]
                return None, min(ttl, MAX_NEGATIVE_TTL, said.resolve_chaining().minimum_ttl)
            except (dns.exception.DNSException, OSError) as error:
                raise _Unanswered(error) from error
            ttl = min(ttl, answer.chaining_result.minimum_ttl)
            if answer.rrset is not None:
                return list(answer.rrset), ttl
            if answer.canonical_name == name:
                return [], min(ttl, MAX_NEGATIVE_TTL)
            name = answer.canonical_name
        raise _Unanswered(f"more than {MAX_ALIASES} aliases, or aliases in a circle, at {name}")


def _options(resolv_conf: Path) -> Mapping[str, int]:
    """The numbers that the file's options give: dnspython knows no `attempts`. Of one that stands twice the last one
    counts."""
    try:
        lines = resolv_conf.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    words = (word for line in lines if line.split()[:1] == ["options"] for word in line.split()[1:])
    pairs = (word.partition(":") for word in words)
    return {name: int(number) for name, _, number in pairs if number.isascii() and number.isdigit()}


def _name(host: str) -> dns.name.Name | None:
    """None for what isn't a name: an address, say."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    else:
        return None
    try:
        return dns.name.from_text(host, None) if host else None
    except (dns.exception.DNSException, UnicodeError):
        return None
