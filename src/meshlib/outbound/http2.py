"""What happens on one HTTP/2 connection? The client's side of RFC 9113 without I/O, over the library h2.

h2 ends a connection with the first GOAWAY that arrives, although the server will still answer what it has begun with.
So frames are looked at on their way to h2, and a GOAWAY never reaches it: streams beyond the last one that it names
were not begun and may be sent elsewhere, whatever their method; those before go on; no new one is opened.

Bytes count against the windows until somebody takes them, so a reader that is slow slows its own server down, and
nobody else's; a stream that is given up gives its bytes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from meshlib.outbound.wire import RawHeaders, SendFailed
from meshlib.policy.retry import LOCAL, REFUSED_STREAM, RESET

HAS_H2 = find_spec("h2") is not None
_GOAWAY = 7
_REFUSED = 7
_CANCEL = 8
_FRAME_HEAD = 9
_LARGEST_ID = 2**31 - 1
_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 1 << 24
"""Bytes that may be under way: a megabyte for each response, sixteen for all on a connection (Envoy has 256 each)."""
_MOST = 100
"""Streams on one connection where the server allows more; with more calls at a time there is another connection."""
_HOPS_OWN = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"host"})
"""Header fields that HTTP/2 says otherwise, or not at all (RFC 9113, 8.2.2)."""


def _nothing() -> None: ...


class Stream:
    """One call on a connection.

    head: status and headers of the response, once they are there. is_over: nothing more will come; failure: why, where
    that is not the response's end. is_sent: the request is out. wake: called when any of this, or its window, has
    changed.
    """

    __slots__ = ("_chunks", "failure", "head", "id", "is_over", "is_sent", "wake")

    def __init__(self, number: int) -> None:
        self.id = number
        self.head: tuple[int, RawHeaders] | None = None
        self.is_over = self.is_sent = False
        self.failure: SendFailed | None = None
        self.wake: Callable[[], None] = _nothing
        self._chunks: deque[tuple[bytes, int]] = deque()

    @property
    def is_readable(self) -> bool:
        """Whether `Http2.take` has something to say: a chunk, the end, or what went wrong."""
        return bool(self._chunks) or self.is_over

    def _end(self, failure: SendFailed | None) -> None:
        if not self.is_over:
            self.is_over, self.failure = True, failure
            self.wake()

    def __repr__(self) -> str:
        return f"<Stream {self.id} {'over' if self.is_over else 'open'}>"


class Http2:
    """One connection. Not thread-safe. After each method that is not a property, what `outgoing` gives is to be sent.

    most: streams at a time (maxConcurrentStreams); None is the server's word, as far as a hundred.
    """

    def __init__(self, most: int | None = None) -> None:
        import h2.config
        import h2.connection
        import h2.events
        import h2.exceptions
        import h2.settings

        self._events, self._error = h2.events, h2.exceptions.H2Error
        config = h2.config.H2Configuration(client_side=True, header_encoding=None)
        self._wire = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        self._wire.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
                codes.MAX_HEADER_LIST_SIZE: 1 << 16,
            },
        )
        self._wire.initiate_connection()
        self._wire.increment_flow_control_window(_CONNECTION_WINDOW)
        self._most = _MOST if most is None else min(most, _MOST)
        self._streams: dict[int, Stream] = {}
        self._inbox = b""
        self.last = _LARGEST_ID
        """The last stream that the server is willing to serve."""
        self.is_broken = False
        self.is_ready = False
        """Whether the server has said what it takes: it speaks HTTP/2, and streams may be opened."""
        self.received = 0
        """Bytes that the server has sent: a sign of life."""

    @property
    def at_once(self) -> int:
        """How many streams there are now."""
        return len(self._streams)

    @property
    def may_open(self) -> bool:
        """Whether another call may go out here."""
        if self.is_broken or self.is_going_away:
            return False
        return len(self._streams) < min(self._most, self._wire.remote_settings.max_concurrent_streams)

    @property
    def is_going_away(self) -> bool:
        """Whether the server has said that it takes no new streams."""
        return self.last != _LARGEST_ID

    @property
    def is_done(self) -> bool:
        """Whether there is no more use for the connection."""
        return self.is_broken or (self.is_going_away and not self._streams)

    def outgoing(self) -> bytes:
        data: bytes = self._wire.data_to_send()
        return data

    def open(self, method: bytes, scheme: bytes, target: bytes, headers: RawHeaders, has_body: bool) -> Stream:
        """Begin a request. headers: as for HTTP/1.1, Host included. Raises SendFailed."""
        authority = next((value for name, value in headers if name.lower() == b"host"), b"")
        lines = [(b":method", method), (b":authority", authority), (b":scheme", scheme), (b":path", target)]
        lines += [(name.lower(), value) for name, value in headers if name.lower() not in _HOPS_OWN]
        try:
            stream = Stream(self._wire.get_next_available_stream_id())
            self._wire.send_headers(stream.id, lines, end_stream=not has_body)
        except self._error as error:
            # h2 looks at the fields while it compresses them, and both ends must have compressed the same: those that
            # are under way go on, and no other begins here.
            self.last = min(self.last, _LARGEST_ID - 1)
            raise SendFailed(LOCAL, "LocalProtocolError", str(error) or type(error).__name__) from error
        stream.is_sent = not has_body
        self._streams[stream.id] = stream
        return stream

    def room(self, stream: Stream) -> int:
        """Bytes of the request's body that may be sent now; none when nobody wants them any more."""
        if stream.is_over:
            return 0
        window: int = self._wire.local_flow_control_window(stream.id)
        return min(window, self._wire.max_outbound_frame_size)

    def send(self, stream: Stream, data: bytes) -> None:
        """A part of the body, at most `room` long."""
        self._wire.send_data(stream.id, data)

    def finish(self, stream: Stream) -> None:
        """The end of the body."""
        if not stream.is_over:
            self._wire.end_stream(stream.id)
            stream.is_sent = True

    def take(self, stream: Stream) -> bytes | None:
        """The next chunk of the response's body, None at its end. Raises SendFailed. Only for what `is_readable`."""
        if stream._chunks:
            data, counted = stream._chunks.popleft()
            self._give_back(stream, counted)
            return data
        if stream.failure is not None:
            raise stream.failure
        return None

    def leave(self, stream: Stream) -> None:
        """The call is done with its response, read or not."""
        self._streams.pop(stream.id, None)
        while stream._chunks:
            self._give_back(stream, stream._chunks.popleft()[1])
        is_complete = stream.is_over and stream.is_sent
        if not is_complete and stream.failure is None and not self.is_broken:
            try:
                self._wire.reset_stream(stream.id, _CANCEL)
            except self._error:
                pass  # it has just ended
        stream._end(None)

    def receive(self, data: bytes) -> None:
        """What the server has sent. Raises nothing: what is wrong ends the connection and all its streams."""
        self.received += len(data)
        whole, self._inbox = self._inbox + data, b""
        passed: list[bytes] = []
        start = 0
        while len(whole) - start >= _FRAME_HEAD:
            length = int.from_bytes(whole[start : start + 3], "big")
            end = start + _FRAME_HEAD + length
            if length > self._wire.max_inbound_frame_size:
                end = len(whole)  # h2 says what is wrong with it
            if end > len(whole):
                break
            if whole[start + 3] == _GOAWAY and length >= 8:
                self._feed(b"".join(passed))
                passed = []
                self._goes_away(int.from_bytes(whole[start + 9 : start + 13], "big") & _LARGEST_ID)
            else:
                passed.append(whole[start:end])
            start = end
        self._inbox = whole[start:]
        self._feed(b"".join(passed))

    def lose(self, told: str) -> None:
        """The connection has ended."""
        self.is_broken = True
        for stream in list(self._streams.values()):
            stream._end(SendFailed(RESET, "RemoteProtocolError", told))

    def _feed(self, data: bytes) -> None:
        if self.is_broken or not data:
            return
        try:
            events = self._wire.receive_data(data)
        except self._error as error:
            self.lose(f"the server broke HTTP/2's rules: {str(error) or type(error).__name__}")
            return
        known = self._events
        for event in events:
            stream = self._streams.get(getattr(event, "stream_id", 0) or 0)
            if isinstance(event, known.WindowUpdated | known.RemoteSettingsChanged):
                self.is_ready = True  # settings are what a server sends first
                for each in [stream] if stream is not None else list(self._streams.values()):
                    each.wake()
            elif isinstance(event, known.DataReceived):
                if stream is None:  # given up in this very moment
                    self._wire.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                else:
                    stream._chunks.append((bytes(event.data), event.flow_controlled_length))
                    stream.wake()
            elif stream is None:
                continue
            elif isinstance(event, known.ResponseReceived):
                stream.head = _head(event.headers)
                if stream.head is None:
                    stream._end(SendFailed(RESET, "RemoteProtocolError", "the response has no status"))
                stream.wake()
            elif isinstance(event, known.StreamEnded):
                stream._end(None)
            elif isinstance(event, known.StreamReset):
                stream._end(_reset(event.error_code))

    def _goes_away(self, last: int) -> None:
        self.last = min(self.last, last, _LARGEST_ID - 1)  # a first one may name the largest: "no new ones, please"
        for stream in list(self._streams.values()):
            if stream.id > last:
                told = "the server is going away and has not begun with this request"
                stream._end(SendFailed(REFUSED_STREAM, "RemoteProtocolError", told))

    def _give_back(self, stream: Stream, counted: int) -> None:
        if not self.is_broken and counted:
            self._wire.acknowledge_received_data(counted, stream.id)

    def __repr__(self) -> str:
        state = "broken" if self.is_broken else "going away" if self.is_going_away else "open"
        return f"<Http2 {state}, {self.at_once} streams>"


def _head(headers: Any) -> tuple[int, RawHeaders] | None:
    lines = [(bytes(name), bytes(value)) for name, value in headers]
    status = next((value for name, value in lines if name == b":status"), b"")
    if not status.isdigit():
        return None
    return int(status), [pair for pair in lines if not pair[0].startswith(b":")]


def _reset(code: Any) -> SendFailed:
    if int(code) == _REFUSED:  # RFC 9113, 8.7: nothing was processed
        return SendFailed(REFUSED_STREAM, "RemoteProtocolError", "the server has refused the stream")
    name = getattr(code, "name", str(code))
    return SendFailed(RESET, "RemoteProtocolError", f"the server has reset the stream: {name}")
