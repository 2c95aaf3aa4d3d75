"""What does an external authorizer say that speaks gRPC? (envoy.service.auth.v3.Authorization/Check.)"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import grpc

from meshlib.inbound.ext_authz import STATUSES, pairs
from meshlib.model import Request
from meshlib.policy.admission import Allow, Authorize, Deny, RawPairs, Verdict
from meshlib.xds import messages as m

_log = logging.getLogger("meshlib.guard")


def ask(channel: grpc.Channel, question: Authorize) -> Verdict | None:
    """None without an answer: no connection, too late, an error of the call, or no CheckResponse."""
    authorizer = question.authorizer
    method: Any = channel.unary_unary(m.AUTHORIZATION_CHECK)
    try:
        data = method(m.serialize(check_request(question, time.time())), timeout=authorizer.timeout)
        answer = m.CheckResponse.FromString(data)
        return _denied(question, answer) if answer.status.code else _allowed(question, answer.ok_response)
    except Exception as error:
        details: Any = getattr(error, "details", None)
        _log.warning("authorizer %s: %s", authorizer.name, details() if callable(details) else repr(error))
        return None


def check_request(question: Authorize, now: float) -> Any:
    """now: seconds since 1970."""
    request, peer = question.request, question.peer
    message = m.CheckRequest()
    attributes = message.attributes
    if peer.identity is not None:
        attributes.source.principal = peer.identity.uri
    _address(attributes.source, peer.address, 0)
    _address(attributes.destination, peer.local_address, peer.local_port)
    attributes.request.time.FromNanoseconds(int(now * 1e9))
    http = attributes.request.http
    http.id = request.headers.get("x-request-id") or ""
    http.method, http.path, http.host, http.scheme = request.method, request.path, request.authority, request.scheme
    http.protocol = "HTTP/1.1"
    length = request.headers.get("content-length") or ""
    http.size = int(length) if length.isdecimal() and len(length) < 19 else -1
    for name, value in _headers(request):
        known = http.headers.get(name)
        http.headers[name] = value if known is None else f"{known},{value}"
    if question.authorizer.max_body:
        http.headers["x-envoy-auth-partial-body"] = "true" if question.is_partial else "false"
        if question.authorizer.raw_body:
            http.raw_body = question.body
        else:
            http.body = question.body.decode("utf-8", "replace")
    return message


def _headers(request: Request) -> Iterable[tuple[str, str]]:
    yield from ((":method", request.method), (":path", request.path), (":authority", request.authority))
    yield ":scheme", request.scheme
    for name, value in pairs(request):
        if name != b"host":
            yield name.decode("latin-1"), value.decode("latin-1")


def _address(of: Any, address: str, port: int) -> None:
    if address:
        of.address.socket_address.address = address
        of.address.socket_address.port_value = port


def _allowed(question: Authorize, said: Any) -> Allow:
    add: list[tuple[bytes, bytes]] = []
    for option in said.headers:
        name, value = _pair(option)
        if option.append.value:  # false by default here, unlike elsewhere (OkHttpResponse.headers)
            before = question.request.headers.get(name.decode("latin-1"))
            value = value if before is None else before.encode("latin-1") + b"," + value
        add.append((name, value))
    # Envoy: what frames and addresses a message is not an authorizer's to remove.
    remove = {name.lower().encode("latin-1") for name in said.headers_to_remove if name.lower() != "host"}
    return Allow(
        frozenset(each for each in remove if not each.startswith(b":")),
        tuple(pair for pair in add if not pair[0].startswith(b":") and pair[0] != b"host"),
        tuple(_pair(option) for option in said.response_headers_to_add),
        frozenset(said.query_parameters_to_remove),
    )


def _denied(question: Authorize, answer: Any) -> Deny:
    said = answer.denied_response
    status = said.status.code if 200 <= said.status.code < 600 else 403
    headers: RawPairs = tuple(_pair(option) for option in said.headers)
    return Deny(
        status,
        said.body.encode("utf-8"),
        tuple(pair for pair in headers if pair[0] not in (b"content-length", b"transfer-encoding")),
        STATUSES.get(status, 2),
        "UAEX",
        "ext_authz_denied",
        reason=f"{question.authorizer.name} says no",
    )


def _pair(option: Any) -> tuple[bytes, bytes]:
    return option.header.key.lower().encode("latin-1"), option.header.value.encode("latin-1", "replace")
