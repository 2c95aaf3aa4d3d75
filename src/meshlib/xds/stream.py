"""How does a Session reach its server? One ADS stream at a time on grpcio's sync API, and a new one when it ends.

The calling thread sleeps on one queue, into which everything falls that can happen: a response, the stream's end,
`wake`, `stop`. It alone touches the Session. What must wait for the network waits on threads that end with the stream:
grpcio's own two, and one that reads, since a sync stream can't be waited for together with anything else.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

# Without it a child that is forked while a stream is open mostly works, and now and then dies or hangs in gRPC's core.
# Read when grpc is first imported; who has set it meant it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

import grpc
from google.protobuf.message import DecodeError

from meshlib.model import FeedState, Node
from meshlib.xds import messages as m
from meshlib.xds.encode import encode_node
from meshlib.xds.resource_types import SHORT_NAMES
from meshlib.xds.session import Request, Resource, Response, Session

_log = logging.getLogger("meshlib.xds")

FIRST_PAUSE, PAUSE_GROWTH, LONGEST_PAUSE = 0.1, 1.6, 5.0
"""Seconds before the first attempt to come back, the growth from one to the next, and the longest. gRPC's xDS client
begins with 1 s and ends with 120 s; a call to a host that is not known yet waits for 5 s, so longer is no use."""
PAUSE_JITTER = 0.4
"""Up to this share of a pause is left out, so that a mesh does not come back in step."""

_WRAPPER = m.type_url(m.Resource)
_OPTIONS = (
    # A control plane of a large mesh sends more than gRPC's 4 MB at once (Envoy has no limit either).
    ("grpc.max_receive_message_length", -1),
    # A peer that vanished without a word is noticed. Istio and go-control-plane allow a ping each 15 and 30 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Each attempt starts from nothing: no connection and no pause left over from the last one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # The control plane is part of the mesh; http_proxy is for what is outside.
    ("grpc.enable_http_proxy", 0),
)


Metadata = tuple[tuple[str, str], ...]
Connect = Callable[[Sequence[tuple[str, Any]]], tuple[Any, Metadata]]


class _Ended(NamedTuple):
    reason: str


class _Event(NamedTuple):
    """stream: the attempt it belongs to, 0 for any. what: None only wakes; True: the server was reached."""

    stream: int
    what: bytes | _Ended | bool | None


class Stream:
    """One Session's way to the server at `target` (`host:port`). Used once, by one thread; see `run`.

    node: read whenever it is to be sent, in the form that `encode` gives it. connect: makes the channel of one attempt,
    and what each call carries (meshlib.identity.access); default plaintext, and nothing. It may block for a few
    seconds, and raise OSError.
    """

    def __init__(
        self,
        target: str,
        session: Session,
        node: Callable[[], Node],
        *,
        connect: Connect | None = None,
        encode: Callable[[Node], Any] = encode_node,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._target = target
        self._connect = connect or (lambda options: (grpc.insecure_channel(target, options=options), ()))
        self._session = session
        self._node, self._encode_node = node, encode
        self._clock = clock
        self._rng = rng or random.Random()
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._stopped = threading.Event()
        self._renewed = threading.Event()
        self._attempt = 0
        self._failures = 0
        self._answered = False
        self._reported: dict[str, frozenset[str]] = {}
        self.has_failed = False
        """Whether any stream has ended."""
        self.state = FeedState()
        """For people and metrics; replaced whole, one attribute read."""

    # From any thread

    def wake(self) -> None:
        """Let `step` be called soon."""
        self._events.put(_Event(0, None))

    def renew_node(self) -> None:
        """The node has changed: send it soon, on the stream that is open or the next."""
        self._renewed.set()
        self.wake()

    def stop(self) -> None:
        self._stopped.set()
        self.wake()

    # The feed's thread

    def run(self, step: Callable[[float], float | None]) -> None:
        """Block until `stop`. After whatever happened, before anything is sent, and when the time that it returned last
        has come, `step(now)` is called: there the session is told what is wanted, and its news are taken.

        Nothing is raised: a stream that fails is logged, and the next one follows after a pause.
        """
        while not self._stopped.is_set():
            self._attempt += 1
            self._answered = False
            opened = self._clock()
            try:
                reason = self._converse(step)
            except Exception:
                # A defect, here or in `step`. It costs a stream, and not the feed.
                _log.exception("the stream to control plane %s ended with an error of the client", self._target)
                reason = "error of the client"
            self._session.stream_closed()
            self.state = self.state._replace(is_connected=False)
            if self._stopped.is_set():
                break
            # A server that answers and falls over at once is given more and more time, like one that is down.
            was_up = self._answered and self._clock() - opened >= LONGEST_PAUSE
            self._failures = 1 if was_up else self._failures + 1
            # An outage is told once, however many attempts it takes.
            level = logging.WARNING if self._answered or not self.has_failed else logging.DEBUG
            _log.log(level, "control plane %s: %s; configuration stays, trying again", self._target, reason)
            self.has_failed = True
            self._pause(step)

    def _pause(self, step: Callable[[float], float | None]) -> None:
        until = self._clock() + pause_after(self._failures, self._rng)
        while not self._stopped.is_set() and self._clock() < until:
            try:
                due = step(self._clock())
            except Exception:
                _log.exception("configuration from control plane %s can't be brought up to date", self._target)
                due = None
            self._wait(_earliest(due, until, self._session.next_deadline))
            self._lapse()

    def _wait(self, until: float | None) -> list[bytes | _Ended | bool]:
        """What has happened on the current stream; returns at `until` with nothing."""
        found: list[bytes | _Ended | bool] = []
        timeout = None if until is None else max(0.0, until - self._clock())
        try:
            event = self._events.get(timeout=timeout)
            while True:
                if event.stream == self._attempt and event.what is not None:
                    found.append(event.what)
                event = self._events.get_nowait()
        except Empty:
            return found

    def _converse(self, step: Callable[[float], float | None]) -> str:
        """One stream from begin to end; returns why it ended."""
        session = self._session
        path = m.ADS_DELTA if session.delta else m.ADS_STREAM
        outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        # Before the connection, which may fail at once or take its time: what is wanted is kept over a stream's end.
        step(self._clock())
        # The channel and the call live on this thread's stack alone: in a forked child nothing ever touches them.
        try:
            channel, metadata = self._connect(_OPTIONS)
        except OSError as error:
            return str(error)
        call: Any = None
        reader: threading.Thread | None = None
        try:
            method: Any = channel.stream_stream(path)  # without serializers: bytes
            call = method(self._sent(outgoing, self._attempt), metadata=metadata)
            reader = threading.Thread(
                target=_read, args=(call, self._events, self._attempt), name="meshlib-ads", daemon=True
            )
            reader.start()
            session.stream_opened()
            is_node_due = True
            while not self._stopped.is_set():
                if self._renewed.is_set():
                    self._renewed.clear()
                    session.announce()
                    is_node_due = True
                due = step(self._clock())
                for request in session.requests(self._clock()):
                    outgoing.put(self._encode(request, self._node() if is_node_due else None))
                    is_node_due = False
                for event in self._wait(_earliest(due, session.next_deadline)):
                    if isinstance(event, _Ended):
                        return event.reason
                    if isinstance(event, bytes):
                        try:
                            self._receive(event)
                        except DecodeError:
                            return "sent what is no discovery response"
                    else:
                        session.stream_ready(self._clock())
                self._lapse()
                for type_url, name in session.expire(self._clock()):
                    _log.warning(
                        "control plane %s says nothing of %s %r, which counts as absent until it does",
                        self._target,
                        SHORT_NAMES[type_url],
                        name,
                    )
            return "stopped"
        finally:
            outgoing.put(None)
            if call is not None:
                call.cancel()
            channel.close()
            if reader is not None:
                reader.join(1.0)

    def _sent(self, outgoing: SimpleQueue[bytes | None], attempt: int) -> Iterator[bytes]:
        """grpcio's thread draws requests from here. It comes for the second once the first was handed to a connection:
        that is how the server is known to be reached, also one that says nothing."""
        is_first = True
        while (request := outgoing.get()) is not None:
            yield request
            if is_first:
                self._events.put(_Event(attempt, True))
                is_first = False

    def _encode(self, request: Request, node: Node | None) -> bytes:
        if self._session.delta:
            message = m.DeltaDiscoveryRequest(
                type_url=request.type_url,
                response_nonce=request.nonce,
                resource_names_subscribe=request.subscribe,
                resource_names_unsubscribe=request.unsubscribe,
                initial_resource_versions=dict(request.initial_versions),
            )
        else:
            message = m.DiscoveryRequest(
                type_url=request.type_url,
                response_nonce=request.nonce,
                resource_names=request.names,
                version_info=request.version,
            )
        if request.error:
            message.error_detail.code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            message.error_detail.message = request.error
        if node is not None:
            message.node.CopyFrom(self._encode_node(node))
        return m.serialize(message)

    def _lapse(self) -> None:
        for type_url, name in self._session.lapse(self._clock()):
            _log.warning(
                "control plane %s has not renewed %s %r in time, which is not used any more",
                self._target,
                SHORT_NAMES[type_url],
                name,
            )

    def _receive(self, data: bytes) -> None:
        response = _decode(data, self._session.delta)
        if not self._answered:
            self._answered = True
            self.state = self.state._replace(is_connected=True, connections=self.state.connections + 1)
            _log.info("control plane %s answers", self._target)
        problems = self._session.received(response, self._clock())
        self._count(SHORT_NAMES.get(response.type_url, "unknown"), is_refused=bool(problems))
        # A server that sends the same again after each NACK must not fill the log.
        known, texts = self._reported.get(response.type_url, frozenset()), frozenset(map(str, problems))
        self._reported[response.type_url] = texts
        for text in sorted(texts - known):
            _log.warning("control plane %s sent what can't be used: %s; the last good one stays", self._target, text)

    def _count(self, name: str, *, is_refused: bool) -> None:
        state = self.state
        counts = dict(state.refused if is_refused else state.accepted)
        counts[name] = counts.get(name, 0) + 1
        told = tuple(sorted(counts.items()))
        if is_refused:
            self.state = state._replace(refused=told)
        else:
            self.state = state._replace(accepted=told, updated=time.time())

    def __repr__(self) -> str:
        state = "answering" if self._answered else f"attempt {self._attempt}"
        return f"<Stream {self._target} {state}: {self._session!r}>"


def pause_after(failures: int, rng: random.Random) -> float:
    """Seconds until the next attempt, after so many (at least one) that failed in a row."""
    pause = min(FIRST_PAUSE * PAUSE_GROWTH ** min(failures - 1, 30), LONGEST_PAUSE)
    return pause * (1.0 - PAUSE_JITTER * rng.random())


def _read(call: Any, events: SimpleQueue[_Event], attempt: int) -> None:
    try:
        for data in call:
            events.put(_Event(attempt, data))
        reason = "the server ended the stream"
    except grpc.RpcError:
        reason = f"{call.code().name}: {call.details()}"
    events.put(_Event(attempt, _Ended(reason)))


def _decode(data: bytes, delta: bool) -> Response:
    if not delta:
        message = m.DiscoveryResponse.FromString(data)
        resources = tuple(_unwrapped(each, message.type_url) for each in message.resources)
        return Response(message.type_url, message.nonce, message.version_info, resources)
    message = m.DeltaDiscoveryResponse.FromString(data)
    return Response(
        message.type_url,
        message.nonce,
        message.system_version_info,
        tuple(
            Resource(
                each.resource.type_url,
                each.name,
                each.version,
                each.resource.value,
                ttl=_seconds(each.ttl),
                is_heartbeat=not each.HasField("resource"),
            )
            for each in message.resources
        ),
        tuple(message.removed_resources),
    )


def _unwrapped(packed: Any, type_url: str) -> Resource:
    """SotW: a resource as it is, or in a Resource, which may say for how long it is good."""
    if packed.type_url == _WRAPPER:
        try:
            each = m.Resource.FromString(packed.value)
        except DecodeError:
            return Resource(packed.type_url, "", "", packed.value)
        if not each.HasField("resource"):
            return Resource(type_url, each.name, "", b"", ttl=_seconds(each.ttl), is_heartbeat=True)
        return Resource(each.resource.type_url, each.name, "", each.resource.value, ttl=_seconds(each.ttl))
    return Resource(packed.type_url, "", "", packed.value)


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)
