"""What is taken up from a request, what is handed on, and what a peer's nonsense can't do."""

from __future__ import annotations

import h11
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.errors import SettingsError
from meshlib.model import Headers
from meshlib.policy.propagation import Carried, CarryingHeaders, Intake, outbound_headers
from snapshots import Clock

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
B3 = "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90"


def take_up(
    *headers: tuple[str, str], forward: tuple[str, ...] = (), clock: Clock | None = None, outer: Carried | None = None
) -> Carried:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return Intake(forward).take_up(raw, clock or Clock(), outer, lambda: b"made-here")


def handed_on(*headers: tuple[str, str], forward: tuple[str, ...] = ()) -> dict[str, str]:
    """What an outbound request without headers of its own gets, but for an x-request-id that was made here."""
    added = outbound_headers(take_up(*headers, forward=forward), Headers())
    found = {name.decode(): value.decode("latin-1") for name, value in added}
    assert len(found) == len(added)
    if found.get("x-request-id") == "made-here":
        del found["x-request-id"]
    return found


@pytest.mark.parametrize(
    "name, value",
    [
        ("x-request-id", "5f2c0a1e-0000-9000-8000-3c6ef372fe94"),
        ("traceparent", TRACEPARENT),
        ("traceparent", "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-will-be-like"),
        ("baggage", "userId=alice,serverNode=DF%2028;p=1"),
        ("b3", B3),
        ("b3", "0"),
        ("x-b3-traceid", "463ac35c9f6413ad48485a3953bb6124"),
        ("x-b3-spanid", "a2fb4a1d1a96d312"),
        ("x-b3-parentspanid", "0020000000000001"),
        ("x-b3-sampled", "1"),
        ("x-b3-flags", "1"),
        ("x-ot-span-context", "4bf9;00f0;1"),
        ("x-datadog-trace-id", "11803532876627986230"),
        ("x-datadog-parent-id", "67667974448284343"),
        ("x-datadog-sampling-priority", "-1"),
        ("x-cloud-trace-context", "105445aa7843bc8bf206b12000100000/1;o=1"),
        ("grpc-trace-bin", "AABL+S81d7NNpqPOkp0ODkc2AQDwZ6oLqQK3AgE="),
        ("sw8", "1-TVJBQ0VJRA==-U0VHTUVOVElE-3-U0VSVklDRQ==-SU5TVEFOQ0U=-RU5EUE9JTlQ=-UEVFUg=="),
    ],
)
def test_trace_context_of_every_format_goes_on_as_it_came(name: str, value: str) -> None:
    """The formats are those that Istio's documentation asks applications to copy by hand."""
    assert handed_on((name, value)) == {name: value}


@pytest.mark.parametrize(
    "name, value",
    [
        ("traceparent", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"),
        ("traceparent", "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("traceparent", TRACEPARENT.upper()),
        ("traceparent", TRACEPARENT + "-more"),
        ("traceparent", f"{TRACEPARENT}, {TRACEPARENT}"),
        ("traceparent", ""),
        ("tracestate", "congo=t61rcWkgMzE"),
        ("b3", "80f198ee56343ba8"),
        ("b3", B3 + "-"),
        ("x-b3-traceid", "463ac35c9f6413ad4848"),
        ("x-b3-sampled", "maybe"),
        ("x-cloud-trace-context", "a" * 1025),
        ("baggage", "user=\x00"),
    ],
)
def test_what_a_specification_does_not_allow_is_left_out(name: str, value: str) -> None:
    """tracestate is on the list because it means nothing without a traceparent."""
    assert handed_on((name, value)) == {}


def test_tracestate_goes_with_its_traceparent() -> None:
    """Several header lines are one list, in their order."""
    found = handed_on(("tracestate", "rojo=1"), ("traceparent", TRACEPARENT), ("tracestate", "congo=2"))
    assert found == {"traceparent": TRACEPARENT, "tracestate": "rojo=1, congo=2"}


def test_lists_that_are_too_long_lose_whole_members_at_their_end() -> None:
    """The trace survives a tracestate that does not."""
    members = [f"vendor{number}={'x' * 50}" for number in range(20)]
    found = handed_on(("traceparent", TRACEPARENT), ("tracestate", ",".join(members)))
    assert found["tracestate"] == ",".join(members[:8])
    assert handed_on(("traceparent", TRACEPARENT), ("tracestate", "v=" + "x" * 511)) == {"traceparent": TRACEPARENT}
    assert handed_on(("baggage", "k=" + "x" * 8190)) == {"baggage": "k=" + "x" * 8190}
    assert handed_on(("baggage", "k=" + "x" * 8191)) == {}


def test_a_request_without_an_id_gets_one() -> None:
    """As Envoy does; no trace is invented beside it."""
    assert take_up().headers == ((b"x-request-id", b"made-here"),)
    assert take_up(("x-request-id", "theirs")).headers == ((b"x-request-id", b"theirs"),)
    assert take_up(("x-request-id", "x" * 257)).headers == ((b"x-request-id", b"made-here"),)
    generated = Intake().take_up([], Clock()).headers[0][1].decode()
    assert len(generated) == 36 and generated != Intake().take_up([], Clock()).headers[0][1].decode()


def test_only_named_headers_are_handed_on() -> None:
    """Cookies and authorization were meant for this service, like everything that no setting names."""
    sent = [("authorization", "Bearer t"), ("cookie", "a=1"), ("end-user", "jason"), ("user-agent", "curl")]
    assert handed_on(*sent) == {}
    assert handed_on(*sent, forward=("End-User",)) == {"end-user": "jason"}
    assert handed_on(*sent, ("cookie", "b=2"), forward=("authorization", "cookie")) == {
        "authorization": "Bearer t",
        "cookie": "a=1; b=2",
    }


def test_a_named_header_that_could_break_a_request_is_left_out() -> None:
    """Bytes beyond ASCII are legal, if old; control characters and what exceeds the limit are not."""
    assert handed_on(("end-user", "Zoë"), forward=("end-user",)) == {"end-user": "Zoë"}
    for value in ("a\nb", "a\x7f", " padded", "", "x" * 8193):
        assert handed_on(("end-user", value), forward=("end-user",)) == {}


@pytest.mark.parametrize("name", ["end user", "", "Content-Length", "connection", "grpc-timeout", "Host"])
def test_names_that_cannot_be_handed_on_are_refused(name: str) -> None:
    """At once, where the application is wrapped, and not with the first request."""
    with pytest.raises(SettingsError, match="forward_headers"):
        Intake([name])


def test_what_the_application_sends_itself_wins() -> None:
    """Whatever its case, for httpx's headers as for raw ones."""
    carried = take_up(("x-request-id", "in"), ("end-user", "jason"), forward=("end-user",))
    assert outbound_headers(carried, httpx.Headers({"End-User": "mary"})) == [(b"x-request-id", b"in")]
    assert outbound_headers(carried, Headers([(b"X-Request-Id", b"own")])) == [(b"end-user", b"jason")]


def test_an_own_span_keeps_all_of_its_format_away() -> None:
    """The inbound tracestate and sampling say nothing about a span that the application's tracer made."""
    brought = (("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("b3", B3), ("x-b3-sampled", "1"))
    carried = take_up(*brought, ("x-request-id", "in"))
    own = Headers([(b"traceparent", TRACEPARENT.replace("00f0", "aaaa").encode())])
    assert [name for name, _ in outbound_headers(carried, own)] == [b"b3", b"x-b3-sampled", b"x-request-id"]
    own = Headers([(b"x-b3-traceid", b"463ac35c9f6413ad")])
    assert [name for name, _ in outbound_headers(carried, own)] == [b"traceparent", b"tracestate", b"x-request-id"]


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"x-envoy-expected-rq-timeout-ms": "1500"}, 1.5),
        ({"x-envoy-upstream-rq-timeout-ms": "250"}, 0.25),
        ({"x-envoy-expected-rq-timeout-ms": "3000", "x-envoy-upstream-rq-timeout-ms": "250"}, 3.0),
        ({"grpc-timeout": "1H"}, 3600.0),
        ({"grpc-timeout": "99999999n"}, 0.099999999),
        ({"grpc-timeout": "200m", "x-envoy-expected-rq-timeout-ms": "150"}, 0.15),
        ({"grpc-timeout": "100m", "x-envoy-expected-rq-timeout-ms": "150"}, 0.1),
        ({"x-envoy-expected-rq-timeout-ms": "0"}, None),
        ({"x-envoy-expected-rq-timeout-ms": "-5"}, None),
        ({"x-envoy-expected-rq-timeout-ms": "1e3"}, None),
        ({"x-envoy-expected-rq-timeout-ms": "9" * 400}, None),
        ({"x-envoy-expected-rq-timeout-ms": "100, 200"}, None),
        ({"grpc-timeout": "100000000m"}, None),
        ({"grpc-timeout": "0S"}, 0.0),
        ({"grpc-timeout": "0n", "x-envoy-expected-rq-timeout-ms": "150"}, 0.0),
        ({"grpc-timeout": "5 S"}, None),
        ({}, None),
    ],
)
def test_the_deadline_is_what_envoy_and_grpc_say_it_is(headers: dict[str, str], seconds: float | None) -> None:
    """0 is no timeout (but for gRPC, where it is no time), a proxy's header counts before a client's, and gRPC's own
    when it is shorter."""
    clock = Clock()
    carried = take_up(*headers.items(), clock=clock)
    assert carried.remaining_deadline() == (None if seconds is None else pytest.approx(clock.now + seconds))
    assert not {b"grpc-timeout", b"x-envoy-upstream-rq-timeout-ms"} & {name for name, _ in carried.headers}


def test_the_time_left_goes_along_and_never_reads_as_no_limit() -> None:
    """Envoy sends 1 ms when the time is over, since 0 would be for ever."""
    clock = Clock()
    carried = take_up(("x-request-id", "in"), ("x-envoy-expected-rq-timeout-ms", "1500"), clock=clock)

    def sent(*present: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        return [pair for pair in outbound_headers(carried, Headers(present)) if pair[0] != b"x-request-id"]

    clock.now += 0.5
    assert sent() == [(b"x-envoy-expected-rq-timeout-ms", b"1000")]
    assert sent((b"X-Envoy-Expected-Rq-Timeout-Ms", b"7")) == []
    assert not carried.has_expired()
    clock.now += 2.0
    assert carried.has_expired()
    assert sent() == [(b"x-envoy-expected-rq-timeout-ms", b"1")]


def test_the_attempts_own_timeout_goes_along_when_it_is_shorter() -> None:
    """As Envoy tells the next service of the route's timeout, and of the last try's where there is one."""
    carried = take_up(("x-request-id", "in"), ("x-envoy-expected-rq-timeout-ms", "1500"))

    def expected(carried: Carried | None, timeout: float | None) -> bytes | None:
        return dict(outbound_headers(carried, Headers(), timeout)).get(b"x-envoy-expected-rq-timeout-ms")

    assert [expected(carried, timeout) for timeout in (None, 0.25, 9.0)] == [b"1500", b"250", b"1500"]
    assert [expected(None, timeout) for timeout in (None, 0.25, 0.0)] == [None, b"250", b"1"]


def test_a_grpc_request_carries_the_deadline_in_grpcs_own_way() -> None:
    """Envoy overrides grpc-timeout in the same manner; one that the application has set stays."""

    def sent(*present: tuple[bytes, bytes], timeout: float | None = 0.25) -> bytes | None:
        return dict(outbound_headers(None, Headers(present), timeout)).get(b"grpc-timeout")

    assert sent((b"Content-Type", b"application/grpc+proto")) == b"250m"
    assert sent((b"content-type", b"application/grpc"), timeout=1e9) == b"99999999m"
    assert sent((b"content-type", b"application/grpc"), timeout=None) is None
    assert sent((b"content-type", b"application/grpc-web+proto")) is None
    assert sent((b"content-type", b"application/grpc"), (b"grpc-timeout", b"1S")) is None
    assert sent() is None


def test_a_finished_request_keeps_nobody_waiting() -> None:
    """Work that goes on after the answer keeps its trace and loses its deadline."""
    clock = Clock()
    carried = take_up(("x-request-id", "in"), ("x-envoy-expected-rq-timeout-ms", "1500"), clock=clock)
    carried.finish()
    clock.now += 2.0
    assert (carried.remaining_deadline(), carried.has_expired()) == (None, False)
    assert outbound_headers(carried, Headers()) == [(b"x-request-id", b"in")]


def test_the_earlier_of_two_deadlines_counts() -> None:
    """An application called in its own process serves within the outer request's time."""
    clock = Clock()
    outer = take_up(("x-envoy-expected-rq-timeout-ms", "1000"), clock=clock)
    assert take_up(clock=clock, outer=outer).remaining_deadline() == clock.now + 1.0
    short, long = ("x-envoy-expected-rq-timeout-ms", "500"), ("x-envoy-expected-rq-timeout-ms", "5000")
    assert take_up(short, clock=clock, outer=outer).remaining_deadline() == clock.now + 0.5
    assert take_up(long, clock=clock, outer=outer).remaining_deadline() == clock.now + 1.0
    outer.finish()
    assert take_up(clock=clock, outer=outer).remaining_deadline() is None


def test_routes_see_what_is_carried() -> None:
    """`end-user: jason` picks a route, whether the application or its caller said so."""
    carried = take_up(("end-user", "jason"), forward=("end-user",))
    assert CarryingHeaders(httpx.Headers(), carried).get("end-user") == "jason"
    assert CarryingHeaders(httpx.Headers({"End-User": "mary"}), carried).get("end-user") == "mary"
    assert CarryingHeaders(httpx.Headers(), carried).get("cookie") is None


_known = st.sampled_from(sorted(Intake(["end-user"]).names))


@settings(deadline=None)  # a busy machine is no finding
@given(st.lists(st.tuples(_known | st.binary(max_size=10), st.binary(max_size=60) | st.binary(max_size=9000))))
def test_no_request_can_make_an_outbound_one_illegal(headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever bytes come in, nothing raises, and all that goes out is what an HTTP/1.1 parser takes."""
    carried = Intake(["end-user"]).take_up(headers, Clock())
    added = outbound_headers(carried, Headers())
    h11.Connection(h11.CLIENT).send(h11.Request(method="GET", target="/", headers=[(b"host", b"a"), *added]))
    assert len({name for name, _ in added}) == len(added)
