"""The table of decisions, by the guard itself and through ASGI, WSGI, gRPC and the gateway."""

from __future__ import annotations

import asyncio
import logging
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from meshlib.gateway.limits import Limits
from meshlib.gateway.protocol import FILTER_CHAIN
from meshlib.gateway.proxy import Proxy
from meshlib.gateway.upstream import UpstreamEngine
from meshlib.inbound.peer import PEER
from meshlib.model import (
    DirectResponse,
    FilterChain,
    Headers,
    Listener,
    Request,
    Route,
    RouteConfiguration,
    RouteMatch,
    Snapshot,
    VirtualHost,
)
from meshlib.policy.admission import Allow
from meshlib.policy.guard import Guard
from security.decisions import DECISIONS, SLEEP, Decision, inbound
from snapshots import mesh, publish

ids = [f"{number}" for number in range(len(DECISIONS))]


def test_the_table_is_long_enough() -> None:
    """At least 150 decisions, each once."""
    assert len(set(DECISIONS)) == len(DECISIONS) >= 150


@pytest.mark.parametrize("given", DECISIONS, ids=ids)
def test_the_guard_decides_as_the_specification_says(given: Decision) -> None:
    """The verdict of the guard alone."""
    method, path = given.target.split(" ")
    raw = [(name.encode(), value.encode()) for name, value in given.headers]
    request = Request(method, "http", given.host.lower(), path, Headers(raw))
    verdict = Guard([inbound(given.spec)]).admit(request, given.peer, 0.0)
    assert isinstance(verdict, Allow) is given.is_allowed, verdict


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_asgi_decides_as_the_specification_says() -> None:
    """Every decision of the table, through the ASGI middleware."""
    wrong = []
    for given in DECISIONS:
        with mesh(Snapshot(inbound=(inbound(given.spec),), complete=True)) as made:
            status = asyncio.run(_status(made.asgi(_app), _scope(given)))
        if (status == 200) is not given.is_allowed:
            wrong.append((given, status))
    assert not wrong


def _scope(given: Decision) -> dict[str, Any]:
    method, _, target = given.target.partition(" ")
    path, _, query = target.partition("?")
    pairs = [(b"host", given.host.encode()), *((n.encode(), v.encode()) for n, v in given.headers)]
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": pairs, "scheme": "http", "extensions": {PEER: given.peer},
    }  # fmt: skip


async def _status(app: Any, scope: Any) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, None, send)
    status: int = sent[0]["status"]
    return status


async def test_the_gateway_decides_as_the_specification_says() -> None:
    """Every decision of the table, through the gateway's proxy, by the rules of its listener."""
    wrong = []
    chain = FilterChain("http.8080")
    answer = RouteConfiguration(
        "http.8080", (VirtualHost("all", ("*",), (Route(RouteMatch(), DirectResponse(200, b"")),)),)
    )
    with mesh() as made:
        proxy = Proxy(made, UpstreamEngine(), Limits(), 0, "meshlib")
        for given in DECISIONS:
            listener = Listener("0.0.0.0_8080", "", "0.0.0.0", 8080, (chain,), access=inbound(given.spec).access)
            publish(made, Snapshot("1", (listener,), (answer,), complete=True))
            scope = _scope(given) | {"state": {FILTER_CHAIN: chain}, "client": (given.peer.address, 50000)}
            status = await _status(proxy, scope)
            if (status == 200) is not given.is_allowed:
                wrong.append((given, status))
        await proxy.aclose()
    assert not wrong


def _wsgi_app(environ: Any, start: Any) -> list[bytes]:
    start("200 OK", [])
    return []


def _into(statuses: list[str]) -> Any:
    return lambda status, headers, *rest: statuses.append(status)


def test_wsgi_decides_as_the_specification_says() -> None:
    """Every decision of the table, through the WSGI middleware."""
    wrong = []
    for given in DECISIONS:
        method, _, target = given.target.partition(" ")
        environ = {"REQUEST_METHOD": method, "RAW_URI": target, "HTTP_HOST": given.host, PEER: given.peer}
        environ |= {"HTTP_" + name.upper().replace("-", "_"): value for name, value in given.headers}
        statuses: list[str] = []
        with mesh(Snapshot(inbound=(inbound(given.spec),), complete=True)) as made:
            made.wsgi(_wsgi_app)(environ, _into(statuses))
        if statuses[0].startswith("200") is not given.is_allowed:
            wrong.append((given, statuses))
    assert not wrong


class _GrpcContext:
    """What gRPC tells of a call: names as grpcio gives them, from the given peer."""

    def __init__(self, given: Decision) -> None:
        self.given, self.code = given, grpc.StatusCode.OK
        self._rpc_event = SimpleNamespace(call_details=SimpleNamespace(host=given.host.encode()))

    def invocation_metadata(self) -> Any:
        return self.given.headers

    def auth_context(self) -> dict[str, list[bytes]]:
        who = self.given.peer.identity
        found = {"transport_security_type": [b"ssl"]} if self.given.peer.is_tls else {}
        return found if who is None else found | {"peer_spiffe_id": [who.uri.encode()]}

    def peer(self) -> str:
        return f"ipv4:{self.given.peer.address}:50000"

    def time_remaining(self) -> None:
        return None

    def add_callback(self, callback: Any) -> bool:
        return True

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise RuntimeError(details)


def test_grpc_decides_as_the_specification_says() -> None:
    """Every decision that can be said in gRPC, where each call is a POST, through the server interceptor."""
    wrong, asked = [], 0
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    for given in DECISIONS:
        method, _, path = given.target.partition(" ")
        if "ethods:" in given.spec and method != "POST":
            continue
        asked += 1
        context = _GrpcContext(given)
        with mesh(Snapshot(inbound=(inbound(given.spec),), complete=True)) as made:
            [interceptor] = made.grpc_server_interceptors(given.peer.local_port)
            details = SimpleNamespace(method=path, invocation_metadata=given.headers)
            try:
                serve = interceptor.intercept_service(lambda _: handler, details).unary_unary
                copy_context().run(serve, b"", context)  # gRPC has one for each call
            except RuntimeError:
                assert context.code is grpc.StatusCode.PERMISSION_DENIED
        is_judged = "connection.sni" not in given.spec  # which gRPC does not tell: so nobody is let in
        if (context.code is grpc.StatusCode.OK) is not (given.is_allowed and is_judged):
            wrong.append((given, context.code))
    assert not wrong
    assert asked >= 180


@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_a_server_name_that_is_not_told_denies(action: str) -> None:
    """By TLS whose name nobody knows, a DENY of names must not let everybody pass. In plaintext there is none."""
    rule = "{when: [{key: connection.sni, values: [a]}]}"
    guard = Guard([inbound(f"{{action: {action}, rules: [{rule}]}}")])
    request = Request("GET", "http", "reviews", "/", Headers(()))
    assert not isinstance(guard.admit(request, SLEEP._replace(sni=""), 0.0), Allow)
    plain = guard.admit(request, SLEEP._replace(sni="", is_tls=False, identity=None), 0.0)
    assert isinstance(plain, Allow) is (action == "DENY")


def test_a_denial_names_rule_file_and_line() -> None:
    """What a person needs to find the rule."""
    guard = Guard([inbound("{action: DENY, rules: [{}]}")])
    verdict = guard.admit(Request("GET", "http", "reviews", "/", Headers()), SLEEP, 0.0)
    assert verdict.status == 403 and verdict.body == b"RBAC: access denied"  # type: ignore[union-attr]
    assert verdict.details == "rbac_access_denied_matched_policy[ns[default]-policy[p]-rule[0]]"  # type: ignore[union-attr]
    assert verdict.origin == "AuthorizationPolicy default/p (p.yaml:4)"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "path", "note"),
    [
        (
            "{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}",
            "/x",
            "dry run: would be denied by ns[default]",
        ),
        ("{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}", "/y", ""),
        (
            "{action: ALLOW, rules: [{to: [{operation: {paths: [/x]}}]}]}",
            "/y",
            "dry run: would be denied, no rule allows",
        ),
        ("{action: ALLOW, rules: [{to: [{operation: {paths: [/x]}}]}]}", "/x", ""),
        ("{}", "/x", "dry run: would be denied, no rule allows it"),
    ],
)
def test_a_dry_run_refuses_nobody_and_says_whom_it_would(spec: str, path: str, note: str) -> None:
    """Annotation istio.io/dry-run, as Istio has it."""
    found = inbound(spec, ", annotations: {istio.io/dry-run: 'true'}")
    verdict = Guard([found]).admit(Request("GET", "http", "reviews", path, Headers()), SLEEP, 0.0)
    assert isinstance(verdict, Allow)
    assert [each.startswith(note) for each in verdict.notes] == ([True] if note else [])


async def test_what_is_audited_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With caller and rule, and without the query; nobody is refused."""
    caplog.set_level(logging.INFO, "meshlib.guard")
    given = Decision("{action: AUDIT, rules: [{to: [{operation: {paths: ['/x*']}}]}]}", "GET /x?token=1", SLEEP, True)
    with mesh(Snapshot(inbound=(inbound(given.spec),), complete=True)) as made:
        assert await _status(made.asgi(_app), _scope(given)) == 200
    [line] = caplog.messages
    assert "GET '/x' from spiffe://cluster.local/ns/foo/sa/sleep: audit: ns[default]-policy[p]-rule[0]" in line
