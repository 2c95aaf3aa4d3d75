"""What does an xDS client say next, and what does it know? The ADS state machine, without I/O and without a clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from meshlib.errors import InvalidResource
from meshlib.model import Cluster, Inbound, Listener, LoadAssignment, RouteConfiguration
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, ROUTE

# The rules, from "xDS REST and gRPC protocol" (Envoy's docs, xds_protocol.rst) and the gRFCs named. SotW is
# StreamAggregatedResources (each request and response carries a state), delta is DeltaAggregatedResources.
#
# Asking
#  1. "Each resource type URL has its own sub-stream": every rule below holds for each type by itself.
#  2. SotW: a request names ALL resources wanted. Delta: it names what to subscribe and what to unsubscribe, relative to
#     what this stream was told before.
#  3. Wildcard (LDS and CDS only): no name in the first request of a stream. Once a name was sent on the stream, no
#     names means "nothing any more", and wildcard is the name "*". So: never send a first request without names for a
#     type that is not meant as wildcard.
#  4. A first request has no nonce ("nonce is empty in the first message"). SotW: it carries the last version accepted,
#     also from an earlier stream; delta: `initial_resource_versions`, what the client still holds. Nothing else
#     survives a stream: nonces and subscriptions are "scoped to an individual stream".
#
# Answering
#  5. Every response is answered once, by its nonce: ACK, or NACK, which is the same with error_detail. "The ACK or NACK
#     is determined by the presence or absence of error_detail" and never by a version.
#  6. SotW: a server ignores a request with a stale nonce, so only the latest response needs an answer; names travel in
#     it. Delta: each nonce is answered; subscriptions do not wait for one ("spontaneous" requests have no nonce).
#  7. A server need not read the subscriptions of a NACK (Istio does not), so changes follow in a request of their own.
#  8. One invalid resource does not spoil the others of its response: they apply (gRFC A46), the response is NACKed with
#     each resource's own reason, and an invalid resource's last good value stays. The version of a SotW NACK is that of
#     the last response which had any valid resource (as gRPC C-core sends it). A name twice in a response is invalid.
#
# Knowing
#  9. A name that no one has answered is REQUESTED. "If the client does not receive a requested resource within 15
#     seconds, it should assume that it does not exist". The timer runs only while the server can be reached
#     (gRFC A57), and only for a resource without a value: a value held from before stays until contradicted.
# 10. Delta: `removed_resources` says that a name does not exist, now or no longer; a name not mentioned is unchanged.
#     SotW: a response for LDS or CDS is the whole set, so a value missing from it is deleted; a name never seen waits
#     for its timer, since the response may have been on its way before the name was asked for. For the other types
#     absence means nothing: they end when no parent names them.
# 11. A resource that comes with a time to live is gone when that has passed, unless it was sent again, or renewed by a
#     heartbeat ("the resource field is unset"); also while no server can be reached, which is what it is for. Sent or
#     renewed without one, it stays. Delta: what has run out on a stream that is open is asked for anew.
# 12. A subscription outlives an answer: what does not exist today is pushed the day it is born.
#
# One resource, as a table. A pair that is not in it cannot happen.


class State(StrEnum):
    """What is known of one resource, in the words of CSDS's ClientResourceStatus."""

    REQUESTED = "REQUESTED"
    DOES_NOT_EXIST = "DOES_NOT_EXIST"
    ACKED = "ACKED"
    NACKED = "NACKED"


class Event(StrEnum):
    VALID = "valid"
    INVALID = "invalid"
    REMOVED = "removed"
    OMITTED = "omitted"
    LAPSED = "lapsed"
    TIMEOUT = "timeout"


TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.REQUESTED: {
        Event.VALID: State.ACKED,
        Event.INVALID: State.NACKED,
        Event.REMOVED: State.DOES_NOT_EXIST,
        Event.OMITTED: State.REQUESTED,
        Event.TIMEOUT: State.DOES_NOT_EXIST,
    },
    State.DOES_NOT_EXIST: {
        Event.VALID: State.ACKED,
        Event.INVALID: State.NACKED,
        Event.REMOVED: State.DOES_NOT_EXIST,
        Event.OMITTED: State.DOES_NOT_EXIST,
    },
    State.ACKED: {
        Event.VALID: State.ACKED,
        Event.INVALID: State.NACKED,
        Event.REMOVED: State.DOES_NOT_EXIST,
        Event.OMITTED: State.DOES_NOT_EXIST,
        Event.LAPSED: State.DOES_NOT_EXIST,
    },
    State.NACKED: {
        Event.VALID: State.ACKED,
        Event.INVALID: State.NACKED,
        Event.REMOVED: State.DOES_NOT_EXIST,
        Event.OMITTED: State.DOES_NOT_EXIST,
        Event.LAPSED: State.DOES_NOT_EXIST,
    },
}

DOES_NOT_EXIST_TIMEOUT = 15.0
WHOLE_SET = frozenset({LISTENER, CLUSTER})
"""The types of which a SotW response is the whole set (rule 10)."""
WILDCARD = "*"

TYPES = (LISTENER, ROUTE, CLUSTER, ENDPOINT)

Value = Listener | Inbound | RouteConfiguration | Cluster | LoadAssignment
Decode = Callable[[str, bytes], Value]


class Resource(NamedTuple):
    """As it came. `name` and `version` are "" in SotW, where the resource itself knows its name. `type_url` may differ
    from the response's, which is the server's mistake. ttl: seconds for which it is good; 0 is without end.
    is_heartbeat: there is no data, and what is known by this name is good for `ttl` more."""

    type_url: str
    name: str
    version: str
    data: bytes
    ttl: float = 0.0
    is_heartbeat: bool = False


class Response(NamedTuple):
    """version: SotW's version_info; delta's system_version_info, which is for people only. removed: delta only."""

    type_url: str
    nonce: str
    version: str = ""
    resources: tuple[Resource, ...] = ()
    removed: tuple[str, ...] = ()


class Request(NamedTuple):
    """SotW sends names and version; delta sends subscribe, unsubscribe and initial_versions. error: "" is an ACK."""

    type_url: str
    nonce: str = ""
    error: str = ""
    names: tuple[str, ...] = ()
    version: str = ""
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial_versions: tuple[tuple[str, str], ...] = ()


class Entry(NamedTuple):
    """What is known of one resource. `since` is when `state` was entered; `data` is what `value` was decoded from."""

    state: State = State.REQUESTED
    value: Value | None = None
    data: bytes = b""
    version: str = ""
    error: str = ""
    since: float = 0.0


class TypeStatus(NamedTuple):
    """For people. error: the last answer's, "" for an ACK. resources: (name, entry) pairs, sorted by name."""

    type_url: str
    version: str
    nonce: str
    error: str
    nacks: int
    resources: tuple[tuple[str, Entry], ...]


class _Reply(NamedTuple):
    nonce: str
    error: str


class _Subscription:
    """One type's sub-stream (rule 1). Below the line: what ends with the stream (rule 4)."""

    __slots__ = (
        "answered",
        "deadlines",
        "entries",
        "error",
        "lapses",
        "nacks",
        "named",
        "nonce",
        "replies",
        "sent",
        "type_url",
        "unconfirmed",
        "version",
        "wanted",
        "wildcard",
    )

    def __init__(self, type_url: str, wildcard: bool) -> None:
        self.type_url = type_url
        self.wildcard = wildcard
        self.wanted: frozenset[str] = frozenset()
        self.entries: dict[str, Entry] = {}
        self.lapses: dict[str, float] = {}
        self.version = ""
        self.answered = False
        self.unconfirmed: set[str] = set()
        self.nacks = 0
        self.error = ""
        # ---
        self.nonce = ""
        self.replies: list[_Reply] = []
        self.sent: frozenset[str] | None = None
        self.named = False
        self.deadlines: dict[str, float] = {}

    def covers(self, name: str) -> bool:
        return self.wildcard or name in self.wanted


class Session:
    """One client's conversation with one server, over as many streams as it takes.

    Feed it with what happens (`stream_opened`, `stream_ready`, `received`, `stream_closed`, `expire`) and with what is
    wanted (`subscribe`, `announce`); send what `requests` returns; read `entry`. Not thread-safe. Times are any
    monotonic clock's.

    decode: (type_url, data) -> value; raises InvalidResource. wildcard: types of which everything is wanted.
    omitted_after: seconds that a name still waits once a whole set came without it (rule 10): less than the timer's for
    a server that answers at once, so that only a response which was on its way has to be waited out.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        delta: bool = True,
        wildcard: Collection[str] = (),
        omitted_after: float = DOES_NOT_EXIST_TIMEOUT,
    ) -> None:
        self._decode, self._omitted_after = decode, omitted_after
        self._subscriptions = {type_url: _Subscription(type_url, type_url in wildcard) for type_url in TYPES}
        self._is_open = False
        self._is_ready = False
        self._announce = False
        self.delta = delta
        self.revision = 0
        """Grows whenever an entry changed."""
        self.last_version = ""
        """The version of the last response, of whatever type; for people."""

    # What is wanted.

    def subscribe(self, type_url: str, names: Iterable[str]) -> None:
        """From now on exactly these are wanted, beside what a wildcard covers. The values of others are dropped once
        the server has been told, so a name that is given up and taken back meanwhile keeps its value."""
        subscription = self._subscriptions[type_url]
        wanted = frozenset(names)
        if wanted == subscription.wanted:
            return
        for name in wanted - subscription.wanted:
            if name not in subscription.entries:
                subscription.entries[name] = Entry()
        subscription.wanted = wanted
        self.revision += 1

    def announce(self) -> None:
        """Something beside subscriptions changed (the node): say something soon, even if there is nothing to say."""
        self._announce = True

    def restore(self, type_url: str, resources: Iterable[Resource], absent: Iterable[str], now: float) -> list[str]:
        """Take over what an earlier process knew, before the first stream; returns one line for what cannot be read.

        A start from disk is a reconnect after a long outage: values serve until the server contradicts them. Versions
        are not taken over, so everything is sent again once: a server may answer a version it knows with silence
        (rule 4), and who knows whether it is the same server, that counts its versions in the same way.
        """
        subscription = self._subscriptions[type_url]
        problems: list[str] = []
        for resource in resources:
            try:
                value = self._value(resource)
            except InvalidResource as problem:
                problems.append(str(problem))
            else:
                subscription.entries[resource.name] = Entry(State.ACKED, value, resource.data, since=now)
                subscription.unconfirmed.add(resource.name)
        for name in absent:
            subscription.entries[name] = Entry(State.DOES_NOT_EXIST, since=now)
            subscription.unconfirmed.add(name)
        subscription.answered = subscription.answered or bool(subscription.entries)
        self.revision += 1
        return problems

    # What happens.

    def stream_opened(self) -> None:
        self._is_open = True
        self._announce = True

    def stream_ready(self, now: float) -> None:
        """The server can be reached: what was asked for so far is on its way, so its timers start (rule 9)."""
        self._is_ready = True
        for subscription in self._subscriptions.values():
            self._start_timers(subscription, subscription.sent or frozenset(), now)

    def stream_closed(self) -> None:
        self._is_open = self._is_ready = False
        for subscription in self._subscriptions.values():
            subscription.nonce = ""
            subscription.replies.clear()
            subscription.sent = None
            subscription.named = False
            subscription.deadlines.clear()
            self._forget(subscription)

    def received(self, response: Response, now: float) -> tuple[InvalidResource, ...]:
        """Apply a response; returns what is wrong with it. Its ACK or NACK is in the next `requests`."""
        subscription = self._subscriptions.get(response.type_url)
        if subscription is None or subscription.sent is None:
            return ()  # never asked for on this stream, so there is no sub-stream on which to answer
        self.last_version = response.version or self.last_version
        invalid: list[InvalidResource] = []
        mentioned: set[str] = set()
        any_valid = False
        known = {} if self.delta else {e.data: e for e in subscription.entries.values()}
        for resource in response.resources:
            if resource.name and not subscription.covers(resource.name):
                continue  # unsubscribed while it was on its way
            if resource.is_heartbeat:
                self._live(subscription, resource.name, resource.ttl, now)
                mentioned.add(resource.name)
                continue
            try:
                old = subscription.entries.get(resource.name) if resource.name else known.get(resource.data)
                if old is not None and old.value is not None and old.data == resource.data:
                    value = old.value  # a SotW push, or a new stream's first, mostly repeats what is known
                else:
                    value = self._value(resource, expected_type=response.type_url)
                name = name_of(value)
                if name in mentioned:
                    raise InvalidResource(response.type_url, name, "", "is in this response twice")
            except InvalidResource as problem:
                invalid.append(problem)
                name = resource.name or problem.name
                if name and name not in mentioned and subscription.covers(name):
                    self._move(subscription, name, Event.INVALID, now, error=str(problem))
                mentioned.add(name)
                continue
            any_valid = True
            mentioned.add(name)
            if subscription.covers(name):
                self._move(subscription, name, Event.VALID, now, value, resource.data, resource.version)
                self._live(subscription, name, resource.ttl, now)
        for name in response.removed:
            if subscription.covers(name):
                self._move(subscription, name, Event.REMOVED, now)
        if not self.delta and response.type_url in WHOLE_SET and "" not in mentioned:  # "": invalid beyond its name
            for name in [*subscription.entries]:
                if name not in mentioned and (subscription.wildcard or name in subscription.sent):
                    self._move(subscription, name, Event.OMITTED, now)
                    if name in subscription.deadlines:
                        latest = now + self._omitted_after
                        subscription.deadlines[name] = min(subscription.deadlines[name], latest)
        if any_valid or not invalid:
            subscription.version = response.version
        if not subscription.answered:
            subscription.answered = True
            self.revision += 1
        subscription.nonce = response.nonce
        subscription.error = _detail(invalid, len(response.resources))
        subscription.nacks += bool(invalid)
        subscription.replies.append(_Reply(response.nonce, subscription.error))
        return tuple(invalid)

    def expire(self, now: float) -> list[tuple[str, str]]:
        """Let run out what is due; returns the types and names of which nothing was said in time."""
        expired: list[tuple[str, str]] = []
        for subscription in self._subscriptions.values():
            for name in [name for name, deadline in subscription.deadlines.items() if deadline <= now]:
                self._move(subscription, name, Event.TIMEOUT, now)
                expired.append((subscription.type_url, name))
        return expired

    def lapse(self, now: float) -> list[tuple[str, str]]:
        """Let go of what was good for a time that is over (rule 11), on a stream or without one; returns the types and
        names."""
        lapsed: list[tuple[str, str]] = []
        for subscription in self._subscriptions.values():
            for name in [name for name, at in subscription.lapses.items() if at <= now]:
                self._move(subscription, name, Event.LAPSED, now)
                lapsed.append((subscription.type_url, name))
                if self.delta and subscription.sent is not None:
                    subscription.sent -= {name}
        return lapsed

    def has_ttl(self, type_url: str, name: str) -> bool:
        """Whether what is known by this name is good for some time only."""
        return name in self._subscriptions[type_url].lapses

    @property
    def next_deadline(self) -> float | None:
        """When `expire` or `lapse` has something to do."""
        times = (each for known in self._subscriptions.values() for each in (known.deadlines, known.lapses))
        return min((at for each in times for at in each.values()), default=None)

    # What is to be sent.

    def requests(self, now: float) -> list[Request]:
        """What to send now, in this order; it counts as sent."""
        if not self._is_open:
            return []
        found: list[Request] = []
        for subscription in self._subscriptions.values():
            found += self._delta_requests(subscription) if self.delta else self._sotw_requests(subscription)
            if self._is_ready:
                self._start_timers(subscription, subscription.wanted, now)
            self._forget(subscription)
        if self._announce and not found:
            found.append(self._greeting())
        self._announce = False
        return found

    def _sotw_requests(self, subscription: _Subscription) -> list[Request]:
        found: list[Request] = []
        is_first = subscription.sent is None
        if is_first and not subscription.wanted and not subscription.wildcard:
            return found  # rule 3
        is_changed = is_first or subscription.wanted != subscription.sent
        reply = subscription.replies[-1] if subscription.replies else None
        subscription.replies.clear()
        if reply is not None and reply.error and is_changed:  # rule 7
            found.append(self._sotw_request(subscription, subscription.sent or frozenset(), reply.error))
            reply = None
        if is_changed or reply is not None:
            subscription.named = subscription.named or bool(subscription.wanted)
            found.append(self._sotw_request(subscription, subscription.wanted, reply.error if reply else ""))
            subscription.sent = subscription.wanted
        return found

    def _sotw_request(self, subscription: _Subscription, names: frozenset[str], error: str) -> Request:
        wildcard = (WILDCARD,) if subscription.wildcard and subscription.named else ()
        return Request(
            subscription.type_url,
            subscription.nonce,
            error,
            names=(*wildcard, *sorted(names)),
            version=subscription.version,
        )

    def _delta_requests(self, subscription: _Subscription) -> list[Request]:
        type_url, wanted, sent = subscription.type_url, subscription.wanted, subscription.sent
        found = [Request(type_url, reply.nonce, reply.error) for reply in subscription.replies]
        subscription.replies.clear()
        if sent is None:
            if not wanted and not subscription.wildcard:
                return found  # rule 3
            held = sorted(
                (name, entry.version)
                for name, entry in subscription.entries.items()
                if entry.value is not None and subscription.covers(name)
            )
            wildcard = (WILDCARD,) if subscription.wildcard and wanted else ()
            found.append(Request(type_url, subscribe=(*wildcard, *sorted(wanted)), initial_versions=tuple(held)))
        elif wanted != sent:
            found.append(
                Request(type_url, subscribe=tuple(sorted(wanted - sent)), unsubscribe=tuple(sorted(sent - wanted)))
            )
        subscription.sent = wanted
        return found

    def _greeting(self) -> Request:
        """Says nothing new: carries the node of a process that wants nothing, or whose node has changed. For ROUTE,
        which knows no wildcard, "no names" is harmless (rule 3)."""
        subscription = self._subscriptions[ROUTE]
        subscription.sent = subscription.sent or frozenset()
        if self.delta:
            return Request(ROUTE)
        return self._sotw_request(subscription, subscription.sent, subscription.error if subscription.nonce else "")

    # What is known.

    def entry(self, type_url: str, name: str) -> Entry | None:
        """None for what was never asked for, nor sent under a wildcard."""
        return self._subscriptions[type_url].entries.get(name)

    def names(self, type_url: str) -> list[str]:
        """What is wanted by name or came under a wildcard, sorted."""
        subscription = self._subscriptions[type_url]
        return sorted(name for name in subscription.entries if subscription.covers(name))

    def is_answered(self, type_url: str) -> bool:
        """Whether any response has come, ever: before it, a wildcard says nothing of what does not exist."""
        return self._subscriptions[type_url].answered

    @property
    def has_unconfirmed(self) -> bool:
        """Whether the server has not yet spoken of something that was restored and is wanted."""
        return any(each.covers(name) for each in self._subscriptions.values() for name in each.unconfirmed)

    def status(self) -> tuple[TypeStatus, ...]:
        """A picture of it all; the one method that another thread may call."""
        return tuple(
            TypeStatus(
                each.type_url,
                each.version,
                each.nonce,
                each.error,
                each.nacks,
                tuple(sorted(each.entries.copy().items())),
            )
            for each in self._subscriptions.values()
        )

    # Details.

    def _value(self, resource: Resource, expected_type: str = "") -> Value:
        type_url = expected_type or resource.type_url
        if resource.type_url != type_url:
            raise InvalidResource(type_url, resource.name, "type_url", f"is {resource.type_url!r}")
        try:
            value = self._decode(type_url, resource.data)
        except InvalidResource as problem:
            if resource.name and not problem.name:
                raise InvalidResource(type_url, resource.name, problem.field, problem.reason) from None
            raise
        except Exception as error:  # a decoder's fault must cost one resource, not the feed
            raise InvalidResource(type_url, resource.name, "", f"cannot be decoded: {error!r}") from error
        if resource.name and name_of(value) != resource.name:
            raise InvalidResource(type_url, resource.name, "name", f"is {name_of(value)!r}")
        return value

    def _move(
        self,
        subscription: _Subscription,
        name: str,
        event: Event,
        now: float,
        value: Value | None = None,
        data: bytes = b"",
        version: str = "",
        error: str = "",
    ) -> None:
        subscription.unconfirmed.discard(name)
        old = subscription.entries.get(name, Entry())
        state = TRANSITIONS[old.state][event]
        if state is State.ACKED:
            new = Entry(state, value, data, version, since=now)
        elif state is State.NACKED:
            new = old._replace(state=state, error=error, since=now)
        elif state is State.DOES_NOT_EXIST and old.state is not state:
            new = Entry(state, since=now)
        else:
            return
        subscription.entries[name] = new
        subscription.deadlines.pop(name, None)
        if new.value is None:
            subscription.lapses.pop(name, None)
        self.revision += 1

    def _live(self, subscription: _Subscription, name: str, ttl: float, now: float) -> None:
        entry = subscription.entries.get(name)
        if ttl > 0 and entry is not None and entry.value is not None:
            subscription.lapses[name] = now + ttl
        else:
            subscription.lapses.pop(name, None)

    def _start_timers(self, subscription: _Subscription, names: Iterable[str], now: float) -> None:
        for name in names:
            if subscription.entries[name].state is State.REQUESTED:
                subscription.deadlines.setdefault(name, now + DOES_NOT_EXIST_TIMEOUT)

    def _forget(self, subscription: _Subscription) -> None:
        """Drop what nobody wants. Under a wildcard that is what was deleted, as soon as nobody asks for it by name."""
        for name, entry in list(subscription.entries.items()):
            if name in subscription.wanted or (subscription.wildcard and entry.state is not State.DOES_NOT_EXIST):
                continue
            del subscription.entries[name]
            subscription.deadlines.pop(name, None)
            subscription.lapses.pop(name, None)

    def __repr__(self) -> str:
        kind = "delta" if self.delta else "SotW"
        state = "ready" if self._is_ready else "opening" if self._is_open else "closed"
        counts = ", ".join(
            f"{each.type_url.rpartition('.')[2]} {sum(e.value is not None for e in each.entries.values())}"
            f"/{len(each.entries)}"
            for each in self._subscriptions.values()
        )
        return f"<Session {kind} {state}: {counts}>"


def name_of(value: Value) -> str:
    return value.cluster if isinstance(value, LoadAssignment) else value.name


def _detail(invalid: list[InvalidResource], of: int) -> str:
    """A NACK's text: every invalid resource with its reason, cut where it would be no use to anyone."""
    if not invalid:
        return ""
    shown = "; ".join(str(problem) for problem in invalid[:20])
    more = f"; and {len(invalid) - 20} more" if len(invalid) > 20 else ""
    return f"{len(invalid)} of {of} resources rejected: {shown}{more}"
