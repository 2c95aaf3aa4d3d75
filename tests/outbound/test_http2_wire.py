"""The protocol of HTTP/2 without a socket: however the bytes come, and whatever they are."""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.outbound.http2 import Http2, Stream
from meshlib.outbound.wire import SendFailed
from meshlib.policy.retry import LOCAL, REFUSED_STREAM, RESET

HEAD = [(b"Host", b"reviews:9080"), (b"X-Own", b"1"), (b"Connection", b"keep-alive")]
ANSWER = [(b":status", b"200"), (b"x-a", b"b")]


class Server:
    """h2's own server, over the same bytes."""

    def __init__(self) -> None:
        self.wire = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.wire.initiate_connection()

    def take(self, data: bytes) -> list[Any]:
        return self.wire.receive_data(data)

    def out(self) -> bytes:
        data: bytes = self.wire.data_to_send()
        return data


def pair() -> tuple[Http2, Server]:
    client, server = Http2(), Server()
    server.take(client.outgoing())
    client.receive(server.out())
    server.take(client.outgoing())
    assert client.is_ready
    return client, server


def call(client: Http2, server: Server, has_body: bool = False) -> Stream:
    stream = client.open(b"GET", b"http", b"/", HEAD, has_body)
    server.take(client.outgoing())
    return stream


def read(client: Http2, stream: Stream) -> bytes:
    body = b""
    while stream.is_readable and (chunk := client.take(stream)) is not None:
        body += chunk
    return body


def go_away(last: int, code: int = 0) -> bytes:
    return b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + last.to_bytes(4, "big") + code.to_bytes(4, "big")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1))
def test_bytes_may_come_in_any_pieces(sizes: list[int]) -> None:
    """Three streams and a farewell after the second, cut anywhere, are always the same."""
    client, server = pair()
    streams = [call(client, server) for _ in range(3)]
    for stream in streams[:2]:
        server.wire.send_headers(stream.id, ANSWER)
        server.wire.send_data(stream.id, b"x" * 1000, end_stream=True)
    first, second = server.out(), go_away(streams[1].id)
    data = second + first
    at = 0
    for size in [*sizes, len(data)]:
        client.receive(data[at : at + size])
        at += size
    assert [stream.is_over for stream in streams] == [True] * 3
    assert [stream.head for stream in streams[:2]] == [(200, [(b"x-a", b"b")])] * 2
    assert [read(client, stream) for stream in streams[:2]] == [b"x" * 1000] * 2
    with pytest.raises(SendFailed) as caught:
        client.take(streams[2])
    assert caught.value.failure == REFUSED_STREAM
    for stream in streams:
        client.leave(stream)
    assert (client.at_once, client.is_done, client.may_open) == (0, True, False)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_no_bytes_raise(garbage: bytes, is_after_the_beginning: bool) -> None:
    """They end the connection and its streams, or mean nothing yet."""
    client, server = pair()
    stream = call(client, server)
    client.receive(garbage if not is_after_the_beginning else server.out() + garbage)
    assert stream.is_over or not client.is_broken
    if client.is_broken:
        assert stream.failure is not None
        assert stream.failure.failure == RESET
    client.lose("gone")
    client.leave(stream)
    client.outgoing()
    assert client.at_once == 0


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_windows_and_streams_are_given_back_whatever_happens(data: st.DataObject) -> None:
    """Answers, resets and calls that are left in the middle, in any order: in the end there is no stream, and as much
    may be sent to this connection as at its beginning."""
    client, server = pair()
    before = server.wire.outbound_flow_control_window
    ended: set[int] = set()
    streams: list[Stream] = []

    def exchange() -> None:
        for event in server.take(client.outgoing()):
            if isinstance(event, h2.events.StreamReset):
                ended.add(event.stream_id)
        client.receive(server.out())

    for _ in range(data.draw(st.integers(1, 25))):
        act = data.draw(st.sampled_from(["open", "head", "data", "end", "reset", "read", "leave"]))
        if act == "open":
            streams.append(client.open(b"GET", b"http", b"/", HEAD, False))
            exchange()
        elif streams:
            stream = data.draw(st.sampled_from(streams))
            is_theirs = stream.id not in ended
            if act == "head" and is_theirs and stream.head is None:
                server.wire.send_headers(stream.id, ANSWER)
            elif act == "data" and is_theirs and stream.head is not None:
                server.wire.send_data(stream.id, b"x" * data.draw(st.integers(1, 16_000)))
            elif act == "end" and is_theirs and stream.head is not None:
                server.wire.end_stream(stream.id)
                ended.add(stream.id)
            elif act == "reset" and is_theirs:
                server.wire.reset_stream(stream.id, 8)
                ended.add(stream.id)
            elif act == "read" and stream.is_readable and stream.failure is None:
                client.take(stream)
            elif act == "leave":
                client.leave(stream)
                streams.remove(stream)
            exchange()
    for stream in streams:
        client.leave(stream)
    exchange()
    exchange()
    assert client.at_once == 0
    assert not client.is_broken
    # h2 sends a window update once a good part of it is due; never is more than half of it withheld.
    assert server.wire.outbound_flow_control_window > before // 2


def test_what_must_not_be_sent_is_the_callers_fault() -> None:
    """A header that HTTP/2 has no form for: no endpoint's failure, and none of the calls beside it."""
    client, server = pair()
    earlier = call(client, server)
    with pytest.raises(SendFailed) as caught:
        client.open(b"GET", b"http", b"/", [*HEAD, (b"te", b"gzip")], False)
    assert caught.value.failure == LOCAL
    assert not client.may_open  # what both ends know of compressed fields differs now
    server.wire.send_headers(earlier.id, ANSWER, end_stream=True)
    client.receive(server.out())
    assert (earlier.head, earlier.failure) == ((200, [(b"x-a", b"b")]), None)


def test_a_response_without_a_status_is_a_reset() -> None:
    """Whatever else it has."""
    client, server = pair()
    stream = call(client, server)
    server.wire.config.validate_outbound_headers = False
    server.wire.config.normalize_outbound_headers = False
    server.wire.send_headers(stream.id, [(b":status", b"abc")])
    client.receive(server.out())
    assert stream.is_over
    assert stream.failure is not None
    assert stream.failure.failure == RESET
