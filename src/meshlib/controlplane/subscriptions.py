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
    routes still uses the old.
13. SotW: a cluster that is gone and that no route leads to any more is left, with its endpoints, to a client that still
    names it: C-core accepts routes at once, follows them when their clusters are ready, and names the old one for as
    long as calls may still take it. (Delta is spoken by clients that hold on to it themselves.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from meshlib.controlplane.resource import Resource, empty_assignment
from meshlib.controlplane.sight import Seen
from meshlib.xds.resource_types import CLUSTER, ENDPOINT, LISTENER, PUSH_ORDER, ROUTE

WHOLE_SET = frozenset({LISTENER, CLUSTER})
WILDCARD = "*"
_BEFORE = {LISTENER: (CLUSTER, ENDPOINT), ROUTE: (CLUSTER, ENDPOINT, LISTENER)}
"""Rule 11: what has to be answered first."""
ABSENT = ""
"""The version of what a client was told not to exist."""


class Request(NamedTuple):
    """Of either variant. names: SotW's whole set, delta's newly subscribed. unsubscribe, initial: delta's only."""

    type_url: str
    names: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial: Mapping[str, str] = {}
    nonce: str = ""
    error: str | None = None


class Answer(NamedTuple):
    """removed: delta's only."""

    type_url: str
    version: str
    nonce: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...] = ()


class Subscription:
    """What one stream has asked for, and was sent, of one type."""

    def __init__(self, type_url: str) -> None:
        self.type_url = type_url
        self.is_wildcard = False
        self.has_named = False
        self.names: set[str] = set()
        self.sent: dict[str, str] = {}
        """name -> version, as the client has it now."""
        self.kept: dict[str, Resource] = {}
        """SotW: the clusters in `sent`. Those that are gone have to be in the whole set until rule 12 lets them go."""
        self.owed: set[str] = set()
        """Names that are answered even if nothing has changed (rules 6 and 9)."""
        self.owes_answer = False
        """An answer is due even if it is empty."""
        self.nonce = self.version = ""
        """Of the latest answer."""
        self.accepted = ""
        """The version that was accepted last."""
        self.in_flight = False
        self.error = ""
        self.latest: tuple[str, ...] = ()
        """What the latest answer named, until it is accepted."""

    def wanted(self, view: Seen, has_catch_all: bool) -> dict[str, Resource | None]:
        """Every name that this subscription covers now; None for those that do not exist."""
        found: dict[str, Resource | None] = {}
        if self.is_wildcard:
            found.update(view.resources.get(self.type_url, {}))
        for name in self.names:
            if name not in found:
                found[name] = view.find(self.type_url, name, has_catch_all=has_catch_all)
        return found

    @property
    def status(self) -> str:
        """As `istioctl proxy-status` says it."""
        if self.error:
            return "NACKED"
        if self.in_flight:
            return "STALE"
        # A client that reconnects with all that there is has been sent nothing, and is not behind.
        return "SYNCED" if self.nonce or self.sent else "NOT SENT"


class Stream:
    """One stream's state. A request goes into `received`; whatever may be sent then comes out of `due`."""

    def __init__(self, *, has_catch_all: bool) -> None:
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
            1 + len(each.names) + len(each.owed) + (0 if each.is_wildcard else len(each.sent))
            for each in self.subscriptions.values()
        )

    def due(self, view: Seen) -> list[Answer]:
        """What can be sent now, in this order. Each Answer counts as sent."""
        answers: list[Answer] = []
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
        if any(self.subscriptions[type_url].error for type_url in (LISTENER, ROUTE) if type_url in self.subscriptions):
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
        self, subscription: Subscription, view: Seen, resources: Iterable[Resource], removed: Iterable[str] = ()
    ) -> Answer:
        self._count += 1
        resources, removed = tuple(resources), tuple(removed)
        version = view.versions.get(subscription.type_url, "0")
        subscription.nonce, subscription.version = f"{self._count}-{version}", version
        subscription.in_flight, subscription.error, subscription.owes_answer = True, "", False
        if subscription.type_url == CLUSTER:
            self._warming.update(each.name for each in resources if subscription.sent.get(each.name) != each.version)
            self._warming.difference_update(removed)
        elif subscription.type_url == ENDPOINT:
            self._warming.difference_update(removed, (each.name for each in resources))
        subscription.latest = (*(each.name for each in resources), *removed)
        for resource in resources:
            subscription.sent[resource.name] = resource.version
        for name in removed:
            subscription.sent[name] = ABSENT
        return Answer(subscription.type_url, version, subscription.nonce, resources, removed)

    def _acknowledge(self, subscription: Subscription, request: Request) -> None:
        if not request.nonce or request.nonce != subscription.nonce:
            return
        if subscription.in_flight or request.error is not None:
            subscription.error = request.error or ""
            if request.error is None:
                subscription.accepted, subscription.latest = subscription.version, ()
        subscription.in_flight = False


class DeltaStream(Stream):
    """DeltaAggregatedResources."""

    def received(self, request: Request) -> None:
        subscription = self.subscriptions.get(request.type_url)
        names = set(request.names)
        if subscription is None:
            subscription = self.subscriptions[request.type_url] = Subscription(request.type_url)
            # A client that has come from SotW knows no resource's version; "" would mean that it does not exist.
            subscription.sent.update((name, version or "unknown") for name, version in request.initial.items())
            if request.type_url in WHOLE_SET and not names:
                names.add(WILDCARD)
            # What the client still has, unchanged, needs no answer (rule 5).
            subscription.owed.update(name for name in names if name not in request.initial)
            subscription.owes_answer = WILDCARD in names
        else:
            subscription.owed.update(names)
        if WILDCARD in names:
            subscription.is_wildcard = True
        subscription.owed.discard(WILDCARD)
        subscription.names |= names - {WILDCARD}
        for name in request.unsubscribe:
            if name == WILDCARD:
                subscription.is_wildcard = False
                subscription.sent = {key: at for key, at in subscription.sent.items() if key in subscription.names}
            else:
                subscription.names.discard(name)
                if subscription.is_wildcard:
                    subscription.owed.add(name)
                else:
                    subscription.sent.pop(name, None)
                    subscription.owed.discard(name)
        self._acknowledge(subscription, request)

    def _answer(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> Answer | None:
        wanted = subscription.wanted(view, self.has_catch_all)
        sent, owed = subscription.sent, subscription.owed
        changed, removed = [], []
        for name in sorted(wanted):
            resource = wanted[name]
            if resource is not None:
                if name in owed or sent.get(name) != resource.version:
                    changed.append(resource)
            elif name in owed or (may_remove and sent.get(name, ABSENT) != ABSENT):
                removed.append(name)
        for name in sorted((owed | sent.keys()) - wanted.keys()):
            # Covered by a wildcard only, and gone; or unsubscribed, and not there for the wildcard either.
            if subscription.is_wildcard and (name in owed or (may_remove and sent.get(name, ABSENT) != ABSENT)):
                removed.append(name)
        owed.clear()
        if not changed and not removed and not subscription.owes_answer:
            if sent and not subscription.nonce:  # it came with all that there is (rule 5)
                subscription.accepted = view.versions.get(subscription.type_url, "0")
            return None
        answer = self._send(subscription, view, changed, removed)
        for name in removed:
            if name not in subscription.names:
                sent.pop(name, None)
        return answer


class SotwStream(Stream):
    """StreamAggregatedResources."""

    def received(self, request: Request) -> None:
        subscription = self.subscriptions.get(request.type_url)
        names = set(request.names)
        if subscription is None:
            subscription = self.subscriptions[request.type_url] = Subscription(request.type_url)
            subscription.is_wildcard = request.type_url in WHOLE_SET and (not names or WILDCARD in names)
            subscription.owes_answer = subscription.is_wildcard or bool(names)
        elif request.nonce != subscription.nonce:
            return
        else:
            self._acknowledge(subscription, request)
            if subscription.has_named or names:
                subscription.is_wildcard = request.type_url in WHOLE_SET and WILDCARD in names
        subscription.has_named |= bool(names)
        names.discard(WILDCARD)
        new = names - subscription.names
        gone = set() if subscription.is_wildcard else (subscription.names | subscription.sent.keys()) - names
        subscription.names = names
        subscription.owed |= new
        subscription.owed -= gone
        for name in gone:
            subscription.sent.pop(name, None)
            subscription.kept.pop(name, None)

    def _answer(self, subscription: Subscription, view: Seen, *, may_remove: bool) -> Answer | None:
        wanted = {
            name: resource
            for name, resource in subscription.wanted(view, self.has_catch_all).items()
            if resource is not None
        }
        owed, sent = subscription.owed, subscription.sent
        lingering = self._lingering(subscription, view, wanted)
        if subscription.type_url in WHOLE_SET:
            if not may_remove:
                wanted = {**subscription.kept, **wanted}
            elif lingering:
                wanted.update((name, subscription.kept[name]) for name in lingering)
            is_due = subscription.owes_answer or bool(owed)
            if not is_due and sent == {name: resource.version for name, resource in wanted.items()}:
                return None
            owed.clear()
            for name in sent.keys() - wanted.keys():
                del sent[name]
            subscription.kept = wanted
            return self._send(subscription, view, (wanted[name] for name in sorted(wanted)))
        if subscription.type_url == ENDPOINT:
            for name in subscription.names - wanted.keys() - lingering:
                if name in owed or (may_remove and sent.get(name) is not None):
                    wanted[name] = empty_assignment(name)
        if may_remove:
            for name in sent.keys() - wanted.keys() - lingering:
                del sent[name]  # it is sent again when it is born again
        changed = [wanted[name] for name in sorted(wanted) if name in owed or sent.get(name) != wanted[name].version]
        owed.clear()
        subscription.owes_answer = False
        return self._send(subscription, view, changed) if changed else None

    def _lingering(self, subscription: Subscription, view: Seen, wanted: Mapping[str, Resource]) -> set[str]:
        """What rule 13 leaves to a client that names its clusters."""
        clusters = self.subscriptions.get(CLUSTER)
        if subscription.type_url not in (CLUSTER, ENDPOINT) or clusters is None or clusters.is_wildcard:
            return set()
        gone = (clusters.kept.keys() & clusters.names) - view.resources[CLUSTER].keys()
        gone = (gone & subscription.names) - wanted.keys()
        return gone - view.routed if gone else gone
