"""Does action CUSTOM ask the authorizer, and do what it says? Real authorizers, HTTP and gRPC, at every edge."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from envoy.service.auth.v3 import external_auth_pb2 as auth

from meshlib.inbound.body import ReplayedInput
from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.model import UNKNOWN_PEER, Headers, Inbound, Node, Request, Snapshot, Workload
from meshlib.policy.admission import Deny
from peers import Answer, Peer, Received, refusing_port
from security.edges import EDGES, by_asgi
from snapshots import mesh

edges = pytest.mark.parametrize("edge", EDGES)
kinds = pytest.mark.parametrize("kind", ["envoyExtAuthzHttp", "envoyExtAuthzGrpc"])
HTTP, GRPC = "envoyExtAuthzHttp", "envoyExtAuthzGrpc"


def rules(kind: str, port: int, settings: str = "", metadata: str = "") -> Inbound:
    """As a user writes them; the authorizer is at `port` of this machine."""
    text = f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: ask, namespace: default{metadata}}}
spec: {{action: CUSTOM, provider: {{name: door}}, rules: [{{to: [{{operation: {{paths: ['/asked*']}}}}]}}]}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: "extensionProviders: [{{name: door, {kind}: {{service: 127.0.0.1, port: {port}{settings}}}}}]"
"""
    parsed = parse_text(text, "ask.yaml")
    assert not parsed.problems, parsed.problems
    return translate(parsed.objects, (), Node("n", Workload("reviews"))).snapshot.inbound[0]


class GrpcAuthorizer:
    """Envoy's own service, served by its own published messages."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.asked: list[Any] = []
        self._answer = answer
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)
        check = grpc.unary_unary_rpc_method_handler(
            self._check, auth.CheckRequest.FromString, auth.CheckResponse.SerializeToString
        )
        handlers = grpc.method_handlers_generic_handler("envoy.service.auth.v3.Authorization", {"Check": check})
        self._server.add_generic_rpc_handlers((handlers,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def _check(self, request: Any, context: Any) -> Any:
        self.asked.append(request.attributes)
        answer = self._answer(request.attributes.request.http)
        if answer is None:
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        return answer

    def __enter__(self) -> GrpcAuthorizer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(10)
        self._pool.shutdown()


def option(key: str, value: str, append: bool | None = None) -> Any:
    header: dict[str, Any] = {"header": {"key": key, "value": value}}
    return header if append is None else header | {"append": {"value": append}}


def by_password(http: Any) -> Any:
    if http.headers.get("authorization") == "letmein":
        return auth.CheckResponse(ok_response={"headers": [option("x-user", "jane")]})
    refused = {"status": {"code": 401}, "body": "who are you?", "headers": [option("www-authenticate", "Basic")]}
    return auth.CheckResponse(status={"code": 16}, denied_response=refused)


def by_password_http(received: Received) -> Answer:
    if received.header("authorization") == "letmein":
        return Answer(headers=[("x-user", "jane"), ("x-secret", "not for you")])
    return Answer(401, b"who are you?", [("www-authenticate", "Basic")])


@contextlib.contextmanager
def authorizer(kind: str) -> Iterator[tuple[int, Callable[[], int]]]:
    """A door that opens by password: its port, and how often it was asked."""
    if kind == GRPC:
        with GrpcAuthorizer(by_password) as made:
            yield made.port, lambda: len(made.asked)
    else:
        with Peer(by_password_http) as peer:
            yield peer.port, lambda: len(peer.received)


@edges
@kinds
def test_the_authorizer_decides_on_what_the_rules_select(
    edge: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its refusal goes back as it is; what it says of who calls goes on, whatever the caller had said of that."""
    caplog.set_level(logging.INFO, "meshlib.guard")
    upstream = ", headersToUpstreamOnAllow: [x-user]" if kind == HTTP else ""
    with authorizer(kind) as (port, asked), edge(rules(kind, port, upstream)) as at, httpx.Client(timeout=20) as client:
        assert client.get(f"{at}/free").status_code == 200
        assert asked() == 0
        refused = client.get(f"{at}/asked", headers={"x-user": "root"})
        assert (refused.status_code, refused.text, refused.headers["www-authenticate"]) == (
            401,
            "who are you?",
            "Basic",
        )
        answer = client.get(f"{at}/asked?a=b", headers={"authorization": "letmein", "x-user": "root"})
        assert answer.status_code == 200
        given = answer.json()["headers"]
        assert given["x-user"] == "jane" and "x-secret" not in given and answer.json()["query"] == "a=b"
        assert asked() == 2
    assert "401 ext_authz_denied: door says no AuthorizationPolicy default/ask" in caplog.text


@edges
@kinds
@pytest.mark.parametrize(
    ("settings", "size", "status", "seen"),
    [
        ("maxRequestBytes: 1000", 1000, 200, 1000),
        ("maxRequestBytes: 1000", 1001, 413, None),
        ("maxRequestBytes: 1000, allowPartialMessage: true", 200_000, 200, 1000),
        ("maxRequestBytes: 1000", 0, 200, 0),
    ],
)
def test_a_body_is_shown_first_and_the_application_gets_all_of_it(
    edge: Any, kind: str, settings: str, size: int, status: int, seen: int | None
) -> None:
    """No more than was asked for; a longer one is refused where it may not be cut."""
    bodies: list[int] = []

    def look(http: Any) -> Any:
        bodies.append(len(http.body))
        return auth.CheckResponse()

    def look_http(received: Received) -> Answer:
        bodies.append(len(received.body))
        return Answer()

    with contextlib.ExitStack() as stack:
        if kind == GRPC:
            port = stack.enter_context(GrpcAuthorizer(look)).port
        else:
            port = stack.enter_context(Peer(look_http)).port
        at = stack.enter_context(edge(rules(kind, port, f", includeRequestBodyInCheck: {{{settings}}}")))
        answer = stack.enter_context(httpx.Client(timeout=20)).post(f"{at}/asked", content=b"x" * size)
    assert answer.status_code == status
    assert bodies == ([] if seen is None else [seen])
    if status == 200:
        assert len(answer.json()["body"]) == size


@edges
@kinds
@pytest.mark.parametrize(
    ("settings", "status"), [("", 403), (", statusOnError: '503'", 503), (", failOpen: true", 200)]
)
def test_without_an_answer_the_call_is_refused_unless_told_otherwise(
    edge: Any, kind: str, settings: str, status: int
) -> None:
    """Nobody there. failOpen lets in, and that is the user's decision."""
    with edge(rules(kind, refusing_port(), settings)) as at:
        assert httpx.get(f"{at}/asked", timeout=20).status_code == status


@kinds
def test_an_authorizer_that_is_slow_or_broken_gives_no_answer(kind: str) -> None:
    """Time is up, an error of the call, a 500: none of them lets in."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(Peer(lambda _: Answer(raw=b"", stall=True))).port
        if kind == GRPC:
            broken = stack.enter_context(GrpcAuthorizer(lambda _: None)).port
        else:
            broken = stack.enter_context(Peer(lambda _: Answer(500))).port
        for port in (silent, broken):
            at = stack.enter_context(by_asgi(rules(kind, port, ", timeout: 0.5s")))
            assert httpx.get(f"{at}/asked", timeout=20).status_code == 403


def test_an_http_authorizer_sees_what_it_is_to_see_and_no_more() -> None:
    """Method, path below its prefix, Host and authorization; other headers by name or by a pattern; headers of ours."""
    settings = (
        ", pathPrefix: /check, includeRequestHeadersInCheck: [cookie, 'x-a*']"
        ", includeAdditionalHeadersInCheck: {x-mesh: ours}"
    )
    sent = {"host": "reviews.shop", "cookie": "c=1", "x-ab": "1", "x-b": "2", "x-mesh": "mine", "authorization": "me"}
    with Peer() as peer, by_asgi(rules(HTTP, peer.port, settings)) as at:
        assert httpx.put(f"{at}/asked/a%20b?q=1", headers=sent, content=b"body", timeout=20).status_code == 200
    received = peer.received[0]
    assert (received.method, received.target, received.body) == ("PUT", "/check/asked/a%20b?q=1", b"")
    wanted = {
        "host": "reviews.shop",
        "cookie": "c=1",
        "x-ab": "1",
        "x-b": None,
        "x-mesh": "ours",
        "authorization": "me",
    }
    assert {name: received.header(name) for name in wanted} == wanted


def test_an_http_authorizers_headers_go_where_they_are_told() -> None:
    """On a refusal those named, or all; on an allowance those named go to the caller. A redirect to a login is one."""

    def answer(received: Received) -> Answer:
        status = 200 if received.header("authorization") else 302
        return Answer(status, headers=[("location", "/login"), ("set-cookie", "s=1"), ("x-internal", "1")])

    settings = ", headersToDownstreamOnAllow: [set-cookie], headersToDownstreamOnDeny: [location, 'set-*']"
    with Peer(answer) as peer, by_asgi(rules(HTTP, peer.port, settings)) as at:
        refused = httpx.get(f"{at}/asked", timeout=20)
        assert (refused.status_code, refused.headers["location"], refused.headers["set-cookie"]) == (
            302,
            "/login",
            "s=1",
        )
        allowed = httpx.get(f"{at}/asked", headers={"authorization": "x"}, timeout=20)
        assert (allowed.status_code, allowed.headers["set-cookie"], "location" in allowed.headers) == (
            200,
            "s=1",
            False,
        )
        assert "x-internal" not in {*refused.headers, *allowed.headers}


def test_a_grpc_authorizer_is_told_all_and_may_change_the_request_and_the_answer() -> None:
    """Attributes as Envoy gives them; headers set, appended and removed, parameters removed, headers for the answer."""
    ok = {
        "headers": [option("x-role", "user"), option("x-hops", "door", True), option(":path", "/admin")],
        "headers_to_remove": ["x-debug", "host"],
        "response_headers_to_add": [option("x-checked", "yes")],
        "query_parameters_to_remove": ["token"],
    }
    sent = {"x-role": "root", "x-hops": "me", "x-debug": "1", "x-request-id": "7"}
    with GrpcAuthorizer(lambda _: auth.CheckResponse(ok_response=ok)) as door, by_asgi(rules(GRPC, door.port)) as at:
        answer = httpx.get(f"{at}/asked?token=t&a=1", headers=sent, timeout=20)
    assert answer.headers["x-checked"] == "yes"
    given = answer.json()
    assert (given["headers"]["x-role"], given["headers"]["x-hops"], given["query"]) == ("user", "me,door", "a=1")
    assert "x-debug" not in given["headers"] and "host" in given["headers"]
    http = door.asked[0].request.http
    assert (http.method, http.path, http.scheme, http.id, http.size) == ("GET", "/asked?token=t&a=1", "http", "7", -1)
    assert (http.headers[":authority"], http.headers["x-role"]) == (http.host, "root")
    assert door.asked[0].source.address.socket_address.address == "127.0.0.1"
    assert door.asked[0].destination.address.socket_address.port_value == int(at.rpartition(":")[2])


def test_raw_bytes_are_sent_as_such() -> None:
    """packAsBytes: what is no text gets there unchanged."""
    settings = ", includeRequestBodyInCheck: {maxRequestBytes: 100, packAsBytes: true}"
    with GrpcAuthorizer(lambda _: auth.CheckResponse()) as door, by_asgi(rules(GRPC, door.port, settings)) as at:
        httpx.post(f"{at}/asked", content=b"\x00\xff", timeout=20)
    assert (door.asked[0].request.http.raw_body, door.asked[0].request.http.body) == (b"\x00\xff", "")


def test_a_path_that_can_be_read_in_two_ways_is_asked_about_in_both() -> None:
    """Or what an authorizer lets in by one spelling would be served by the other."""

    def only_open(received: Received) -> Answer:
        return Answer(200 if received.target.startswith("/asked/open") else 403)

    with Peer(only_open) as peer, by_asgi(rules(HTTP, peer.port)) as at:
        assert httpx.get(f"{at}/asked/open/x", timeout=20).status_code == 200
        assert httpx.get(f"{at}/asked/open/..%2fshut", timeout=20).status_code == 403
    assert [each.target for each in peer.received] == ["/asked/open/x", "/asked/open/..%2fshut", "/asked/shut"]


def test_a_dry_run_asks_nobody_and_says_what_it_would_have_done(caplog: pytest.LogCaptureFixture) -> None:
    """Annotation istio.io/dry-run."""
    caplog.set_level(logging.INFO, "meshlib.guard")
    dry = ", annotations: {istio.io/dry-run: 'true'}"
    with Peer(lambda _: Answer(403)) as peer, by_asgi(rules(HTTP, peer.port, metadata=dry)) as at:
        assert httpx.get(f"{at}/asked", timeout=20).status_code == 200
    assert peer.received == []
    assert "dry run: ns[default]-policy[ask]-rule[0] would ask door" in caplog.text


def test_grpc_calls_are_asked_about_and_one_whose_body_should_be_seen_is_refused() -> None:
    """An interceptor comes after the message was read: the authorizer can't see it, and that lets nobody in."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"ok")
    codes = []
    for settings in ("", ", includeRequestBodyInCheck: {maxRequestBytes: 10}"):
        with (
            GrpcAuthorizer(lambda _: auth.CheckResponse()) as door,
            mesh(Snapshot(inbound=(rules(GRPC, door.port, settings),), complete=True)) as made,
            ThreadPoolExecutor(2) as pool,
        ):
            server = grpc.server(pool, interceptors=made.grpc_server_interceptors(8080))
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("asked", {"Call": handler}),))
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                try:
                    channel.unary_unary("/asked/Call")(b"", timeout=20)
                    codes.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    codes.append(error.code())  # type: ignore[attr-defined]
            server.stop(0).wait(10)
            assert len(door.asked) == (settings == "")
    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED]


def test_an_input_that_was_looked_at_reads_as_before() -> None:
    """By every way that WSGI has; and never further than the request's length, where some servers block."""
    text = b"one\ntwo\nthree"

    class Blocking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert (size is not None and size <= len(text) - self.tell()) or size == -1
            return super().read(size)

    def looked_at(limit: int) -> Any:
        found = ReplayedInput({"wsgi.input": Blocking(text), "CONTENT_LENGTH": str(len(text))})
        assert found.take(limit) == text[: limit + 1]
        return found

    for limit in (1, 5, 100):
        assert looked_at(limit).read() == text
        assert looked_at(limit).read(len(text)) == text
        assert list(looked_at(limit)) == looked_at(limit).readlines() == [b"one\n", b"two\n", b"three"]
        given = looked_at(limit)
        assert (given.readline(2), given.readline(), given.read(3)) == (b"on", b"e\n", b"two")


async def test_a_slow_authorizer_does_not_hold_up_the_applications_threads() -> None:
    """Thirty calls wait for an answer that does not come; what the application does in threads goes on."""
    enough = asyncio.Event()

    async def late(_: Received) -> Answer:
        await enough.wait()
        return Answer(403)

    with Peer(late) as slow, mesh(Snapshot(inbound=(rules(HTTP, slow.port, ", timeout: 60s"),), complete=True)) as made:
        reception = made.reception()
        request = Request("GET", "http", "reviews", "/asked", Headers())
        waiting = [asyncio.create_task(reception.admit_async(request, UNKNOWN_PEER)) for _ in range(30)]
        async with asyncio.timeout(30):
            while len(slow.received) < 30:  # noqa: ASYNC110 -- filled by another thread
                await asyncio.sleep(0.02)
            assert await asyncio.to_thread(lambda: "done") == "done"
            slow.loop.call_soon_threadsafe(enough.set)
            for verdict in await asyncio.gather(*waiting):
                assert isinstance(verdict, Deny) and verdict.details == "ext_authz_denied"
