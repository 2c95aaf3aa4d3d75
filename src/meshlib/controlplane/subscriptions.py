"""What does one stream get next? The server's half of ADS as a state machine, without I/O.

The rules, from "xDS REST and gRPC protocol" (Envoy's docs, xds_protocol.rst); SotW is state of the world.

Reading
 1. Each resource type is a sub-stream of its own.
 2. A NACK is a request with error_detail; versions decide nothing. It is noted and not answered: what was refused is
    sent again when it has changed, not before. The names in it count like those in any request, since a client that
    has sent them once need not repeat them. The first request with a nonce is its ACK or NACK; later ones only change
    the subscription.
 3. SotW: a request with a nonce that is not the latest is out of date and ignored. Delta: its subscriptions count all
    the same; only the ACK is ignored.
 4. SotW: names are the whole set. Without any, the first request for LDS or CDS is a wildcard; once names were sent on
    the stream, none means nothing any more, and wildcard is the name "*".
 5. The first delta request for a type tells what the client still has (initial_resource_versions): only what differs
    is sent, and what is gone is removed.

Answering
 6. A name newly asked for is answered, also when nothing has changed since it was sent: the client may have forgotten
    it. So is a name that is unsubscribed but covered by a wildcard.
 7. A name that does not exist is remembered, and sent when it is born. Delta says at once that it does not exist; SotW
    can say so only for LDS and CDS, by an answer without it.
 8. SotW: an answer for LDS and CDS is the whole set, for RDS and EDS what has changed. A LoadAssignment that does not
    exist is sent as an empty one, since an Envoy would wait for it for ever.
 9. A cluster that has changed gets its LoadAssignment again, though that is the same: an Envoy warms the new cluster
    until one comes (Istio: AlwaysRespond).
10. One answer of a type is in flight at a time; what changes meanwhile is sent together after it was answered.

Order (make before break)
11. Clusters, endpoints, listeners, routes, in this order. To a client that has all clusters (wildcard, as an Envoy)
    listeners and routes are sent when those before them were answered: it asks for a new cluster's endpoints, and
    accepts the cluster once it has them (an Envoy that warms one pauses CDS), so both are there before a route names
    them. A client that names its clusters asks for one because a route
    names it; there is nothing to wait for.
12. Clusters and endpoints that are gone are taken away last, when everything else was accepted: who has refused the new
    routes still uses the old, unless it has given them up.
13. SotW: a cluster that is gone and that no route leads to any more is left, with its endpoints, to a client that still
    names it: C-core accepts routes at once, follows them when their clusters are ready, and names the old one for as
    long as calls may still take it. (Delta is spoken by clients that hold on to it themselves.)

Time to live
14. What has one is renewed three times in it, by a heartbeat: an answer whose resources are names without content. It
    says nothing of a refusal that stands, and is itself one of the answers that rule 10 counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from meshlib.controlplane.changes import NOTHING
from meshlib.controlplane.resource import Resource, empty_assignment
from meshlib.controlplane.sight import Seen
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE
from meshlib.xds.xdstp import SCHEME, parse

WHOLE_SET = frozenset({LISTENER, CLUSTER})
WILDCARD = "*"
_BEFORE = {LISTENER: (CLUSTER, ENDPOINT), ROUTE: (CLUSTER, ENDPOINT, LISTENER)}
"""Rule 11: what has to be answered first."""
RENEWALS = 3
"""In one time to live: two may be lost, or come late."""
ABSENT = ""
"""The version of what a client was told not to exist."""


class Request(NamedTuple):
    """Of either variant. names: SotW's whole set, delta's newly subscribed; streams that ask for the same may have the
    same frozenset of them, which they then share. unsubscribe, initial: delta's only."""

    type_url: str
    names: tuple[str, ...] | frozenset[str] = ()
    unsubscribe: tuple[str, ...] = ()
    initial: Mapping[str, str] = {}
    nonce: str = ""
    error: str | None = None


class Answer(NamedTuple):
    """removed: delta's only. ttl: seconds for which the resources are good; 0 is without end. is_heartbeat: they come
    without their content."""

    type_url: str
    version: str
    nonce: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...] = ()
    ttl: float = 0.0
    is_heartbeat: bool = False


class Subscription:
    """What one stream has asked for, and was sent, of one type.

    A change is looked at once: `follow` notes which of the names that are covered it concerns. All others are, at the
    client, as they are in `view`, or as rules 12 and 13 leave them, so nobody goes through them again.
    """

    def __init__(self, type_url: str) -> None:
        self.type_url = type_url
        self.is_wildcard = False
        self.has_named = False
        self.names: AbstractSet[str] = frozenset()
        self.has_uris = False
        """Whether it names, or named, any by `xdstp://`: what changes is known by plain names."""
        self._plain: dict[str, list[str]] | None = None
        self.said: AbstractSet[str] | None = None
        """SotW: the names of the last request, as they came."""
        self.told: dict[str, str] = {}
        """name -> version, as the client has it now; of SotW's whole sets `kept` says it."""
        self.kept: Mapping[str, Resource] = {}
        """SotW: what whole set the client has. Clusters that are gone stay in it until rule 12 lets them go. May be the
        view's own."""
        self.view: Seen | None = None
        """What was looked at last; None when all has to be looked at."""
        self.pending: set[str] = set()
        """Names that the client may have to be told of."""
        self.owed: set[str] = set()
        """Names that are answered even if nothing has changed (rules 6 and 9)."""
        self.owes_answer = False
        """An answer is due even if it is empty."""
        self.nonce = self.version = ""
        """Of the latest answer."""
        self.accepted = ""
        """The version that was accepted last."""
        self.in_flight = False
        self.is_heartbeat = False
        """What is in flight."""
        self.renew_at = 0.0
        """When its time to live has to be renewed, on the clock of `due`."""
        self.error = ""
        self.unaccepted: Answer | None = None
        """The latest answer, until it is accepted."""

    @property
    def sent(self) -> Mapping[str, str]:
        """name -> version, as the client has it now."""
        return {**self.told, **{name: resource.version for name, resource in self.kept.items()}}

    @property
    def is_refused(self) -> bool:
        """Whether the client still uses what was before something that it has refused; not if it has given that up."""
        if not self.error or self.unaccepted is None:
            return False
        return self.is_wildcard or any(each.name in self.names for each in self.unaccepted.resources)

    @property
    def has_any(self) -> bool:
        """Whether anything was sent that the client may still have."""
        return bool(self.told or self.kept)

    @property
    def latest(self) -> frozenset[str]:
        """What the latest answer named, until it is accepted."""
        answer = self.unaccepted
        return frozenset() if answer is None else frozenset(each.name for each in answer.resources) | {*answer.removed}

    def add(self, names: frozenset[str]) -> None:
        self.note_uris(names)
        if not self.names:
            self.names = names
        elif names:
            self.names = _own(self.names)
            self.names |= names

    def note_uris(self, names: AbstractSet[str]) -> None:
        self._plain = None
        self.has_uris = self.has_uris or any(name.startswith(SCHEME) for name in names)

    def _by_plain_name(self) -> Mapping[str, list[str]]:
        """The `xdstp://` names, by what a change knows them by."""
        if self._plain is None:
            self._plain = {}
            for name in self.names:
                if (found := parse(name)) is not None:
                    self._plain.setdefault(found.plain, []).append(name)
        return self._plain

    def remove(self, names: frozenset[str]) -> None:
        if names:
            self._plain = None
            self.names = _own(self.names)
            self.names -= names

    def find(self, name: str, view: Seen, has_catch_all: bool) -> Resource | None:
        """What the client shall have by this name; None where it is not covered, or does not exist."""
        if name in self.names:
            return view.find(self.type_url, name, has_catch_all=has_catch_all)
        return view.resources.get(self.type_url, {}).get(name) if self.is_wildcard else None

    def follow(self, view: Seen) -> None:
        """Note what of this view has to be looked at."""
        before, self.view = self.view, view
        if before is view:
            return
        existing = view.resources.get(self.type_url, {})
        if before is None:
            self.pending.update(self.names, self.told, self.kept, existing if self.is_wildcard else ())
            return
        changes = view.changes_since(before).get(self.type_url, NOTHING)
        self.pending |= changes.names if self.is_wildcard else changes.names & self.names
        if self.has_uris:
            plain = self._by_plain_name()
            self.pending.update(*(plain[name] for name in changes.names & plain.keys()))
        if changes.renamed:
            self.pending |= self.names - existing.keys()
        if len(self.pending) > len(existing) + len(self.names) + len(self.told) + len(self.kept):
            # Whoever never answers, while services come and go, is not to remember all of them.
            self.pending.intersection_update({*existing, *self.names, *self.told, *self.kept})

    @property
    def status(self) -> str:
        """As `istioctl proxy-status` says it."""
        if self.error:
            return "NACKED"
        if self.in_flight:
            return "STALE"
        # A client that reconnects with all that there is has been sent nothing, and is not behind.
        return "SYNCED" if self.nonce or self.has_any else "NOT SENT"


def _own(names: AbstractSet[str]) -> set[str]:
    """A set that may be changed: the first is shared."""
    return names if isinstance(names, set) else set(names)


class Stream:
    """One stream's state. A request goes into `received`; whatever may be sent then comes out of `due`."""

    def __init__(self, *, has_catch_all: bool, ttls: Mapping[str, float] = {}) -> None:
        """ttls: seconds by type; only for a client that heeds them."""
        self._ttls = ttls
        self.subscriptions: dict[str, Subscription] = {}
        self.has_catch_all = has_catch_all
        self._count = 0
        self._warming: set[str] = set()
        """Clusters whose LoadAssignment is due, and was not sent yet (rule 9)."""

    def received(self, request: Request) -> None:
        raise NotImplementedError

    @property
    def is_answered(self) -> bool:
        """Whether the client has answered all that it was sent."""
        return not any(each.in_flight for each in self.subscriptions.values())

    @property
    def size(self) -> int:
        """How much is kept of what the client has said, in names. What a wildcard has brought is not the client's."""
        return sum(
            1 + len(each.names) + len(each.owed) + (0 if each.is_wildcard else len(each.told) + len(each.kept))
            for each in self.subscriptions.values()
        )

    def is_concerned(self, view: Seen) -> bool:
        """Whether this view has anything that `due` has to look at."""
        for each in self.subscriptions.values():
            each.follow(view)
        return any(each.pending for each in self.subscriptions.values())

    def due(self, view: Seen, now: float = 0.0) -> list[Answer]:
        """What can be sent now, in this order. Each Answer counts as sent. now: of any monotonic clock."""
        answers = self._news(view)
        for type_url, ttl in self._ttls.items():
            subscription = self.subscriptions.get(type_url)
            if subscription is None or not subscription.has_any:
                continue
            if not subscription.in_flight and subscription.renew_at <= now:
                answers.append(self._heartbeat(subscription, view))
                subscription.renew_at = now + ttl / RENEWALS
            elif not subscription.renew_at:
                subscription.renew_at = now + ttl / RENEWALS
        return answers

    @property
    def renew_at(self) -> float | None:
        """When `due` has a heartbeat to send, if nothing happens before."""
        known = (self.subscriptions.get(type_url) for type_url in self._ttls)
        waiting = (each for each in known if each is not None and each.has_any and not each.in_flight)
        return min((each.renew_at for each in waiting), default=None)

    def _news(self, view: Seen) -> list[Answer]:
        answers: list[Answer] = []
        for each in self.subscriptions.values():
            each.follow(view)
        clusters = self.subscriptions.get(CLUSTER)
        is_ordered = clusters is not None and clusters.is_wildcard
        for type_url in self._order():
            if is_ordered and any(self._is_in_flight(each) for each in _BEFORE.get(type_url, ())):
                return answers
            subscription = self.subscriptions[type_url]
            if not subscription.in_flight:
                answers += self._answers(subscription, view, may_remove=type_url not in (CLUSTER, ENDPOINT))
        if any(each.in_flight for each in self.subscriptions.values()):
            return answers
        if any(self.subscriptions[each].is_refused for each in (LISTENER, ROUTE) if each in self.subscriptions):
            return answers
        for type_url in (CLUSTER, ENDPOINT):
            if type_url in self.subscriptions:
                answers += self._answers(self.subscriptions[type_url], view, may_remove=True)
        return answers

    def _is_in_flight(self, type_url: str) -> bool:
        return type_url in self.subscriptions and self.subscriptions[type_url].in_flight

    def _order(self) -> Iterable[str]:
        known = [type_url for type_url in PUSH_ORDER if type_url in self.subscriptions]
        return [*(type_url for type_url in self.subscriptions if type_url not in PUSH_ORDER), *known]

    def _answers(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> list[Answer]:
        """None or one."""
        if subscription.type_url == ENDPOINT:
            subscription.owed |= self._warming & subscription.names
        answer = self._answer(subscription, view, may_remove=may_remove)
        return [] if answer is None else [answer]

    def _answer(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> Answer | None:
        raise NotImplementedError

    def _send(
        self,
        subscription: Subscription,
        view: Seen,
        resources: Iterable[Resource],
        removed: Iterable[str] = (),
        *,
        changed: Iterable[str],
    ) -> Answer:
        """changed: the names of those resources that the client did not have in this version."""
        self._count += 1
        resources, removed = tuple(resources), tuple(removed)
        version = view.versions.get(subscription.type_url, "0")
        subscription.nonce, subscription.version = f"{self._count}-{version}", version
        subscription.in_flight, subscription.error, subscription.owes_answer = True, "", False
        if subscription.type_url == CLUSTER:
            self._warming.update(changed)
            self._warming.difference_update(removed)
        elif subscription.type_url == ENDPOINT and self._warming:
            self._warming.difference_update(removed, (each.name for each in resources))
        subscription.is_heartbeat = False
        ttl = self._ttls.get(subscription.type_url, 0.0)
        answer = Answer(subscription.type_url, version, subscription.nonce, resources, removed, ttl)
        subscription.unaccepted = answer
        return answer

    def _heartbeat(self, subscription: Subscription, view: Seen) -> Answer:
        """All that the client has. It leaves what is known of the client's answer to the last content."""
        self._count += 1
        type_url = subscription.type_url
        version = subscription.version or view.versions.get(type_url, "0")
        subscription.nonce = f"{self._count}-{version}"
        subscription.in_flight = subscription.is_heartbeat = True
        beats = tuple(
            Resource(type_url, name, at, b"") for name, at in sorted(subscription.sent.items()) if at != ABSENT
        )
        return Answer(type_url, version, subscription.nonce, beats, (), self._ttls[type_url], is_heartbeat=True)

    def _acknowledge(self, subscription: Subscription, request: Request) -> None:
        if not request.nonce or request.nonce != subscription.nonce:
            return
        if subscription.is_heartbeat and request.error is None:
            pass
        elif subscription.in_flight or request.error is not None:
            subscription.error = request.error or ""
            if request.error is None:
                subscription.accepted, subscription.unaccepted = subscription.version, None
        subscription.in_flight = False


class DeltaStream(Stream):
    """DeltaAggregatedResources."""

    def received(self, request: Request) -> None:
        subscription = self.subscriptions.get(request.type_url)
        names = request.names if isinstance(request.names, frozenset) else frozenset(request.names)
        has_wildcard = WILDCARD in names
        if subscription is None:
            subscription = self.subscriptions[request.type_url] = Subscription(request.type_url)
            # A client that has come from SotW knows no resource's version; "" would mean that it does not exist.
            subscription.told.update((name, version or "unknown") for name, version in request.initial.items())
            has_wildcard = has_wildcard or (request.type_url in WHOLE_SET and not names)
            # What the client still has, unchanged, needs no answer (rule 5).
            subscription.owed.update(names - request.initial.keys())
            subscription.owes_answer = has_wildcard
        else:
            subscription.owed.update(names)
        if has_wildcard:
            subscription.is_wildcard, subscription.view = True, None
        subscription.owed.discard(WILDCARD)
        subscription.add(names - {WILDCARD} if WILDCARD in names else names)
        if WILDCARD in request.unsubscribe:
            subscription.is_wildcard = False
            subscription.told = {key: at for key, at in subscription.told.items() if key in subscription.names}
        self._drop(subscription, frozenset(request.unsubscribe) - {WILDCARD})
        self._acknowledge(subscription, request)

    @staticmethod
    def _drop(subscription: Subscription, names: frozenset[str]) -> None:
        subscription.remove(names)
        if subscription.is_wildcard:
            subscription.owed |= names
        else:
            subscription.owed -= names
            for name in names:
                subscription.told.pop(name, None)

    def _answer(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> Answer | None:
        told, owed, later = subscription.told, subscription.owed, set()
        sent: list[Resource] = []
        changed, removed = [], []
        for name in sorted(subscription.pending | owed):
            resource, has = subscription.find(name, view, self.has_catch_all), told.get(name, ABSENT)
            if resource is not None:
                if has != resource.version:
                    changed.append(name)
                    sent.append(resource)
                elif name in owed:
                    sent.append(resource)
            elif name not in subscription.names and not subscription.is_wildcard:
                continue
            elif name in owed or (may_remove and has != ABSENT):
                # Named, covered by a wildcard only and gone, or unsubscribed and not there for the wildcard either.
                removed.append(name)
            elif has != ABSENT:
                later.add(name)
        owed.clear()
        subscription.pending = later
        if not sent and not removed and not subscription.owes_answer:
            if told and not subscription.nonce:  # it came with all that there is (rule 5)
                subscription.accepted = view.versions.get(subscription.type_url, "0")
            return None
        for resource in sent:
            told[resource.name] = resource.version
        for name in removed:
            if name in subscription.names:
                told[name] = ABSENT
            else:
                told.pop(name, None)
        return self._send(subscription, view, sent, removed, changed=changed)


class SotwStream(Stream):
    """StreamAggregatedResources."""

    def received(self, request: Request) -> None:
        subscription = self.subscriptions.get(request.type_url)
        names = request.names if isinstance(request.names, frozenset) else frozenset(request.names)
        if subscription is None:
            subscription = self.subscriptions[request.type_url] = Subscription(request.type_url)
            subscription.is_wildcard = request.type_url in WHOLE_SET and (not names or WILDCARD in names)
            subscription.owes_answer = subscription.is_wildcard or bool(names)
        elif request.nonce != subscription.nonce:
            return
        else:
            self._acknowledge(subscription, request)
            if names is subscription.said:
                return  # it asks for what it asked for before
            if subscription.has_named or names:
                was, subscription.is_wildcard = (
                    subscription.is_wildcard,
                    request.type_url in WHOLE_SET and WILDCARD in names,
                )
                if subscription.is_wildcard and not was:
                    subscription.view = None
        subscription.said = names
        subscription.has_named |= bool(names)
        if WILDCARD in names:
            names -= {WILDCARD}
        subscription.owed |= names - subscription.names
        if subscription.is_wildcard:
            subscription.pending |= subscription.names - names
        else:
            gone = (subscription.names | subscription.told.keys() | subscription.kept.keys()) - names
            subscription.owed -= gone
            for name in gone & subscription.told.keys():
                del subscription.told[name]
            if not gone.isdisjoint(subscription.kept):
                subscription.kept = {name: each for name, each in subscription.kept.items() if name not in gone}
        subscription.names = names
        subscription.note_uris(names)

    def _answer(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> Answer | None:
        if subscription.type_url in WHOLE_SET:
            return self._whole_set(subscription, view, may_remove=may_remove)
        told, owed, later = subscription.told, subscription.owed, set()
        sent: list[Resource] = []
        for name in sorted((subscription.pending | owed) & subscription.names):
            resource = subscription.find(name, view, self.has_catch_all)
            if resource is None:
                if self._lingers(subscription, name, view):
                    later.add(name)
                    continue
                if subscription.type_url == ENDPOINT and (name in owed or (may_remove and name in told)):
                    resource = empty_assignment(name)
                elif name not in told:
                    continue
                elif may_remove:
                    del told[name]  # it is sent again when it is born again
                    continue
                else:
                    later.add(name)
                    continue
            if name in owed or told.get(name) != resource.version:
                sent.append(resource)
                told[name] = resource.version
        owed.clear()
        subscription.pending, subscription.owes_answer = later, False
        return self._send(subscription, view, sent, changed=()) if sent else None

    def _whole_set(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> Answer | None:
        kept, later = subscription.kept, set()
        fresh: dict[str, Resource] = {}
        changed, gone = [], []
        for name in subscription.pending | subscription.owed:
            resource, has = subscription.find(name, view, self.has_catch_all), kept.get(name)
            if resource is None and has is not None and (not may_remove or self._lingers(subscription, name, view)):
                later.add(name)
            elif resource is None:
                gone += [name] if has is not None else []
            elif has is None or has.version != resource.version:
                changed.append(name)
                fresh[name] = resource
        is_due = subscription.owes_answer or bool(subscription.owed)
        subscription.owed.clear()
        subscription.pending = later
        if not is_due and not changed and not gone:
            return None
        existing = view.resources.get(subscription.type_url, {})
        if subscription.is_wildcard and not later and subscription.names <= existing.keys():
            kept = existing  # shared by all who have the same
        else:
            kept = {**kept, **fresh}
            for name in gone:
                del kept[name]
        subscription.kept = kept
        return self._send(subscription, view, (kept[name] for name in sorted(kept)), changed=changed)

    def _lingers(self, subscription: Subscription, name: str, view: Seen) -> bool:
        """Whether rule 13 leaves what is gone to a client that names its clusters."""
        clusters = self.subscriptions.get(CLUSTER)
        return (
            subscription.type_url in (CLUSTER, ENDPOINT)
            and clusters is not None
            and not clusters.is_wildcard
            and name in clusters.kept
            and name in clusters.names
            and name not in view.resources[CLUSTER]
            and name not in view.routed
        )
