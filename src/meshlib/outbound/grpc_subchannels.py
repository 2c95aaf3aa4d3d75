"""Which connection does an attempt take? One gRPC channel for each (cluster, endpoint, authority), made at first use.

gRPC's own name resolution and balancing are off in them: each is one address. Of its retries those stay that no policy
asks for (gRFC A6, transparent retries): of calls that a server has turned away by its GOAWAY without a look at them,
and of those that never left this process. Only gRPC knows for certain which these are. What a service config of the
user's says of retries and hedges is left out: that is the route's word. The rules:
- `use_local_subchannel_pool`: two clusters at one address share no connection, since limits and TLS are per cluster.
- One that is no longer wanted (its endpoint is gone, its certificate was replaced, it has served long enough) takes no
  new call, and is closed once its last has ended: make before break.
- Closing waits for gRPC's own thread, so it is never done on that one: whoever comes next closes what is drained.
- In a forked child the parent's are neither used nor closed.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import TlsContexts
from meshlib.model import Cluster, ClusterType, Endpoint, SpiffeId, UpstreamTls
from meshlib.outbound.connections import may_serve
from meshlib.policy.live import Live
from meshlib.policy.steps import Send
from meshlib.state import forks

Options = tuple[tuple[str, Any], ...]
Open = Callable[[str, Options, grpc.ChannelCredentials | None], Any]
"""Makes a channel: target, options, credentials (None is plaintext)."""

IDLE = 300.0
"""Seconds after which a connection without a call is given up, unless the destination says otherwise. gRPC's own
default is half an hour."""
_FIRST_BACKOFF, _LONGEST_BACKOFF = 100, 5_000
"""Milliseconds between gRPC's attempts to connect. It begins with 1 s and ends with 120: too long for an endpoint that
is one of several, and that no call waits for."""
_CALLABLES = 256
_VERIFIED = "grpc.ssl_target_name_override"

_orphans: list[SubChannel] = []


class Secured(NamedTuple):
    """How to speak to a cluster over TLS. version: anything that is equal as long as the credentials are the same."""

    credentials: grpc.ChannelCredentials
    target_name: str
    version: object
    is_mesh: bool = False


class SubChannel:
    """One native channel, and the calls in flight on it."""

    __slots__ = ("calls", "channel", "key", "limits", "made", "opened", "served", "used", "version")

    def __init__(self, key: tuple[str, str, str], channel: Any, cluster: Cluster, version: object, now: float) -> None:
        self.key, self.channel, self.limits, self.version = key, channel, cluster.limits, version
        self.opened = self.used = now
        self.calls = self.served = 0
        self.made: dict[tuple[Any, ...], Any] = {}

    def callable(self, kind: str, path: str, serializer: Any, deserializer: Any, is_registered: bool) -> Any:
        """The native multi-callable, kept for the next call: making one costs as much as a call."""
        found = self.made.get((kind, path, serializer, deserializer))
        if found is None:
            make = getattr(self.channel, kind)
            found = make(path, serializer, deserializer, _registered_method=is_registered)
            if len(self.made) >= _CALLABLES:  # somebody makes a serializer for each call
                self.made.clear()
            self.made[kind, path, serializer, deserializer] = found
        return found

    def __repr__(self) -> str:
        return f"<SubChannel {' '.join(filter(None, self.key))}, {self.calls} in flight>"


class SubChannels:
    """The sub-channels of one channel of the user's. Thread-safe; its lock is held for bookkeeping alone."""

    def __init__(
        self, make: Open, options: Options, contexts: TlsContexts, own: grpc.ChannelCredentials | None = None
    ) -> None:
        """options: the user's. own: the user's, too, for clusters that say nothing about TLS."""
        self._make, self._options, self._contexts, self._own = make, options, contexts, own
        self._lock = forks.lock()
        self._pid = os.getpid()
        self._open: dict[tuple[str, str, str], SubChannel] = {}
        self._retired: list[SubChannel] = []
        self._seen: Live | None = None
        self._next_sweep = 0.0
        self.is_closed = False

    @property
    def is_secured(self) -> bool:
        """Whether the user has given credentials."""
        return self._own is not None

    def take(self, step: Send, authority: str, live: Live) -> tuple[SubChannel, list[Any]]:
        """A sub-channel for an attempt, to be given back; and native channels that are to be closed now.

        Raises ValueError when the channel is closed (as gRPC's own does), OSError for TLS files that can't be read.
        """
        cluster = step.cluster.cluster
        key = (cluster.name, step.endpoint.authority, step.authority or authority)
        how = secured(self._contexts, cluster, step.endpoint, authority)
        if how is None and self._own is not None:
            how = Secured(self._own, _host_of(authority), self._own)
        now = time.monotonic()
        drained: list[Any] = []
        with self._lock:
            if self._pid != os.getpid():
                self._forget()
            if self.is_closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            if live is not self._seen or now >= self._next_sweep or self._retired:
                drained = self._sweep(live, now)
            found = self._open.get(key)
            if found is not None and not (
                found.version == (None if how is None else how.version)
                and may_serve(cluster.limits, found.served, found.opened, now)
            ):
                self._retire(found)
                found = None
            if found is None:
                found = self._open[key] = self._opened(key, cluster, how, now)
            found.calls += 1
            found.served += 1
            found.used = now
        return found, drained

    def give_back(self, one: SubChannel) -> None:
        """Its call has ended. Never blocks, on any thread."""
        with self._lock:
            one.calls -= 1

    def close(self) -> list[Any]:
        """All native channels, to be closed, whatever is in flight. Idempotent."""
        with self._lock:
            if self._pid != os.getpid():
                self._forget()
            self.is_closed = True
            every = [*self._open.values(), *self._retired]
            self._open, self._retired = {}, []
        return [each.channel for each in every]

    def __len__(self) -> int:
        return len(self._open) + len(self._retired)

    def _opened(self, key: tuple[str, str, str], cluster: Cluster, how: Secured | None, now: float) -> SubChannel:
        idle = IDLE if cluster.limits.idle_timeout is None else cluster.limits.idle_timeout
        ours: Options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.client_idle_timeout_ms", max(1000, int(idle * 1000))),
        )
        # Of two values gRPC takes the first: the name that is verified is ours, unless the credentials are the user's;
        # everything else is the user's to say.
        if cluster.type is ClusterType.ORIGINAL_DST and key[1] == key[2]:
            told = (*self._options, *ours)  # where the target itself leads: as without a mesh
        else:
            options = _without_retries(self._options)
            ours += (*_of_the_cluster(cluster), *self._names(key[2], how))
            is_own = how is not None and how.credentials is self._own
            verified: Options = () if how is None else ((_VERIFIED, how.target_name),)
            told = (*options, *verified, *ours) if is_own else (*verified, *options, *ours)
        channel = self._make(_target(key[1]), told, None if how is None else how.credentials)
        return SubChannel(key, channel, cluster, None if how is None else how.version, now)

    def _names(self, authority: str, how: Secured | None) -> Options:
        """What the server sees as the call's authority."""
        if how is not None and how.is_mesh:
            # gRPC refuses a call whose authority the server's certificate does not bear, unless it is the channel's own
            # name, which it compares without a port.
            authority = authority.rpartition(":")[0] or authority
        elif how is not None and how.credentials is self._own and any(name == _VERIFIED for name, _ in self._options):
            return ()  # the name that the user has verified stands for both
        return (("grpc.default_authority", authority),)

    def _sweep(self, live: Live, now: float) -> list[Any]:
        """Retire what no call will want again; native channels of those that are drained. With the lock held."""
        self._next_sweep = now + IDLE / 10
        if live is not self._seen:
            self._seen = live
            for one in list(self._open.values()):
                cluster = live.cluster(one.key[0])
                if cluster is not None and (
                    cluster.cluster.type is ClusterType.ORIGINAL_DST or cluster.has_endpoint(one.key[1])
                ):
                    continue
                self._retire(one)
        for one in list(self._open.values()):
            idle = IDLE if one.limits.idle_timeout is None else one.limits.idle_timeout
            if not one.calls and now - one.used > idle:
                self._retire(one)
        drained = [one for one in self._retired if not one.calls]
        if drained:
            self._retired = [one for one in self._retired if one.calls]
        return [one.channel for one in drained]

    def _retire(self, one: SubChannel) -> None:
        del self._open[one.key]
        self._retired.append(one)

    def _forget(self) -> None:
        _orphans.extend((*self._open.values(), *self._retired))
        self._open, self._retired, self._pid = {}, [], os.getpid()

    def __repr__(self) -> str:
        return f"<SubChannels {len(self._open)} open, {len(self._retired)} draining>"


def _without_retries(options: Options) -> Options:
    return tuple(
        (name, _without_policies(value) if name == "grpc.service_config" else value) for name, value in options
    )


def _without_policies(text: Any) -> Any:
    try:
        config = json.loads(text)
        for method in config.get("methodConfig", ()):
            method.pop("retryPolicy", None)
            method.pop("hedgingPolicy", None)
    except (ValueError, TypeError, AttributeError):
        return text  # gRPC says what is wrong with it
    return json.dumps(config)


def _of_the_cluster(cluster: Cluster) -> Options:
    """gRPC neither resolves nor balances by itself."""
    return (
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.min_reconnect_backoff_ms", max(1, int(cluster.connect_timeout * 1000))),
        ("grpc.initial_reconnect_backoff_ms", _FIRST_BACKOFF),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_BACKOFF),
    )


def _target(authority: str) -> str:
    """As gRPC's resolvers want it: an address as it is, a name by DNS."""
    host = authority.rpartition(":")[0]
    if host.startswith("["):
        return f"ipv6:{authority}"
    return f"ipv4:{authority}" if host.replace(".", "").isdigit() else f"dns:///{authority}"


def secured(contexts: TlsContexts, cluster: Cluster, endpoint: Endpoint, authority: str) -> Secured | None:
    """How an endpoint is spoken to for an authority; None is plaintext. Raises OSError (NoCredentials among it) when a
    file can't be read, there is nothing to prove who we are, or gRPC's Python API can't verify what is demanded."""
    tls = cluster.tls
    if tls is None or (tls.auto and not (endpoint.is_meshed and contexts.has_identity)):
        return None
    if tls.is_mesh:
        name, credentials = _account_of(tls, cluster.name), contexts.present()
        return Secured(_of_the_mesh(credentials), name, (tls, credentials), True)
    if tls.insecure_skip_verify:
        raise ssl.SSLError(f"{cluster.name}: insecureSkipVerify: gRPC always verifies the server's certificate")
    return Secured(_credentials(tls), _name_of(tls, authority), tls)


def _account_of(tls: UpstreamTls, cluster: str) -> str:
    """The DNS name of the one account that may answer, `<account>.<namespace>.sa.<trust domain>`, which our CA puts
    beside its SPIFFE ID: gRPC can't verify the URI itself."""
    names = {_dns_of(name) for name in tls.subject_alt_names}
    if len(names) != 1:
        told = ", ".join(sorted(tls.subject_alt_names)) or "any"
        raise ssl.SSLError(f"{cluster}: gRPC can verify one account, and these may serve it: {told}")
    return names.pop()


def _dns_of(name: str) -> str:
    if "://" not in name:
        return name
    try:
        identity = SpiffeId.parse(name)
    except ValueError as error:
        raise ssl.SSLError(str(error)) from None
    return f"{identity.service_account}.{identity.namespace}.sa.{identity.trust_domain}"


@lru_cache(maxsize=8)
def _of_the_mesh(credentials: Credentials) -> grpc.ChannelCredentials:
    # Roots of our own domain alone: gRPC would let every root vouch for every domain.
    roots = dict(credentials.trust_bundles)[credentials.identity.trust_domain]
    return grpc.ssl_channel_credentials(roots, credentials.private_key, credentials.certificate_chain)


def _name_of(tls: UpstreamTls, authority: str) -> str:
    """The name that the certificate must bear. gRPC looks at DNS names and addresses only, and at one."""
    if not tls.subject_alt_names:
        return tls.sni or _host_of(authority)
    for name in tls.subject_alt_names:
        if "://" not in name:
            return name
    raise ssl.SSLError(f"subjectAltNames {', '.join(tls.subject_alt_names)}: gRPC can't verify a URI in a certificate")


def _host_of(authority: str) -> str:
    host, _, port = authority.rpartition(":")
    return host.strip("[]") if host and port.isdigit() else authority


@lru_cache(maxsize=1024)
def _credentials(tls: UpstreamTls) -> grpc.ChannelCredentials:
    roots = _read(tls.ca_file) if tls.ca_file else None
    if tls.certificate_file:
        return grpc.ssl_channel_credentials(roots, _read(tls.private_key_file), _read(tls.certificate_file))
    return grpc.ssl_channel_credentials(roots)


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
