"""What do Envoy's command operators say of a request? The text of a tag of spans, with its operators filled in.

As in Envoy's tags, what is not known is nothing, and no `-`. Values of parameters that are credentials by their name
are `REDACTED`, as everywhere in a span.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from meshlib.model import Command, HeaderView, parts_of
from meshlib.policy.observer import Call, Served
from meshlib.telemetry.cel import NotUsable, attributes, compiled, evaluated, fields_of_call, fields_of_served
from meshlib.telemetry.scrub import scrubbed

_log = logging.getLogger("meshlib.telemetry")


class Seen(NamedTuple):
    """What a request's end tells. fields: of `fields_of_call` or `fields_of_served`. more: what only operators ask."""

    fields: Mapping[str, Any]
    request: HeaderView
    response: HeaderView | None
    more: Mapping[str, object]


def seen_call(call: Call) -> Seen:
    request, last = call.request, call.last
    assert request is not None
    more: dict[str, object] = {
        "GRPC_STATUS": call.grpc_status,
        "UPSTREAM_HOST": "" if last is None else last.endpoint.authority,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT": call.attempts,
        ":scheme": request.scheme,
    }
    return Seen(fields_of_call(call), request.headers, call.response_headers, more | _of_mark(call.mark))


def seen_request(served: Served) -> Seen:
    identity = served.peer.identity
    port = served.client_port or ""
    more: dict[str, object] = {
        "GRPC_STATUS": served.grpc_status,
        "REQUESTED_SERVER_NAME": served.peer.sni,
        "DOWNSTREAM_PEER_URI_SAN": "" if identity is None else identity.uri,
        "DOWNSTREAM_REMOTE_ADDRESS": f"{served.client}:{port}" if port else served.client,
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": served.client,
        "DOWNSTREAM_REMOTE_PORT": port,
        ":scheme": "https" if served.peer.is_tls else "http",
    }
    return Seen(fields_of_served(served), served.headers, None, more | _of_mark(served.mark))


def _of_mark(mark: Any) -> dict[str, object]:
    return {} if mark is None else {"TRACE_ID": mark[0], "SPAN_ID": mark[1]}


def filled_in(text: str, seen: Seen) -> str:
    """Never raises: "" for a text that can't be read."""
    try:
        parts = parts_of(text)
    except ValueError:
        return ""
    return "".join(part if isinstance(part, str) else _value(part, seen) for part in parts)


def _value(command: Command, seen: Seen) -> str:
    operator = command.operator
    found: object
    if operator in _BY_ARGUMENT:
        found = _BY_ARGUMENT[operator](command.argument, seen)
    elif operator == "HOSTNAME":
        found = socket.gethostname()
    elif operator == "GRPC_STATUS_NUMBER":
        found = seen.more["GRPC_STATUS"]
    elif operator in seen.more:
        found = seen.more[operator]
    else:
        found = seen.fields.get(operator.lower())
    told = "" if found is None else scrubbed(str(found))
    return told[: command.longest] if command.longest else told


def _header(argument: str, seen: Seen, headers: HeaderView | None) -> str | None:
    """`X?Y`: of the first that is there."""
    for name in argument.split("?"):
        name = name.strip().lower()
        found = seen.more.get(name) if name.startswith(":") else None
        if name in _PSEUDO and headers is seen.request:
            found = seen.fields[_PSEUDO[name]]
        elif headers is not None and not name.startswith(":"):
            found = headers.get(name)
        if found:
            return str(found)
    return None


_PSEUDO = {":method": "method", ":path": "path", ":authority": "authority"}


def _without_query(argument: str, seen: Seen) -> str | None:
    found = _header(argument, seen, seen.request)
    return None if found is None else found.partition("?")[0]


def _expression(argument: str, seen: Seen) -> object:
    program = _program(argument)
    if program is None:
        return None
    try:
        return evaluated(program, attributes(seen.fields, seen.request, seen.response))
    except NotUsable as error:
        _log.debug("%%CEL(%s)%%: %s", argument, error)
        return None


@lru_cache(maxsize=64)
def _program(expression: str) -> Any:
    """None where it can't be read; that is said once."""
    try:
        return compiled(expression)
    except NotUsable as error:
        _log.warning("%%CEL(%s)%% in a tag of spans says nothing: %s", expression, error)
        return None


_BY_ARGUMENT: Mapping[str, Callable[[str, Seen], object]] = {
    "REQ": lambda argument, seen: _header(argument, seen, seen.request),
    "RESP": lambda argument, seen: _header(argument, seen, seen.response),
    "REQ_WITHOUT_QUERY": _without_query,
    "ENVIRONMENT": lambda argument, seen: os.environ.get(argument),
    "CEL": _expression,
}
