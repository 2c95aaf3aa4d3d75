"""What does an expression of the configuration say of a request? CEL over Envoy's attributes.

By the evaluator that Envoys use; needs the extra `telemetry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshlib.model import HeaderView
from meshlib.policy.observer import Call, Served

_GROUPS = ("request", "response", "xds")


class NotUsable(Exception):
    """An expression that can't be read, or that nobody here can evaluate. The message says why."""


def compiled(expression: str) -> Any:
    """Raises NotUsable."""
    try:
        from cel_expr_python import cel
    except ImportError:
        raise NotUsable("install meshlib-proxyless[telemetry]") from None
    group = cel.Type.Map(cel.Type.STRING, cel.Type.DYN)
    try:
        return cel.NewEnv(variables=dict.fromkeys(_GROUPS, group)).compile(expression)
    except RuntimeError as error:
        raise NotUsable(first_line(error)) from None


def evaluated(program: Any, attributes: Mapping[str, Any]) -> Any:
    """Raises NotUsable."""
    try:
        found = program.eval(data=attributes)
    except RuntimeError as error:
        raise NotUsable(first_line(error)) from None
    if str(found.type()) in ("ERROR", "UNKNOWN"):  # the evaluator's own way to fail: the value is the reason
        raise NotUsable(str(found.value()).partition("\n")[0])
    return found.value()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def fields_of_call(call: Call) -> dict[str, Any]:
    """What `attributes` is made of, by the access log's names."""
    request = call.request
    assert request is not None
    there, back = call.body_sizes
    return {
        "method": request.method,
        "path": request.path,
        "authority": request.authority,
        "user_agent": request.headers.get("user-agent"),
        "request_id": request.headers.get("x-request-id"),
        "bytes_received": there,
        "duration": int((call.ended - call.began) * 1000),
        "protocol": None,
        "response_code": call.status,
        "response_flags": call.flags or "-",
        "response_code_details": "via_upstream" if call.response_headers is not None else None,
        "bytes_sent": back,
        "upstream_cluster": None if call.cluster is None else call.cluster.name,
        "route_name": None if call.decision is None else call.decision.route.name or "default",
    }


def fields_of_served(served: Served) -> dict[str, Any]:
    return {
        "method": served.method,
        "path": served.path,
        "authority": served.authority,
        "user_agent": served.headers.get("user-agent"),
        "request_id": served.headers.get("x-request-id"),
        "bytes_received": served.request_bytes,
        "duration": int((served.ended - served.began) * 1000),
        "protocol": served.protocol,
        "response_code": served.status,
        "response_flags": served.flags or "-",
        "response_code_details": served.reason or None,
        "bytes_sent": served.response_bytes,
        "upstream_cluster": f"inbound|{served.peer.local_port or ''}||",
        "route_name": served.route or "default",
    }


def attributes(fields: Mapping[str, Any], request: HeaderView, response: HeaderView | None) -> dict[str, Any]:
    """Envoy's attributes, as Istio's filters name them."""
    path, _, query = str(fields["path"] or "").partition("?")
    return {
        "request": {
            "method": fields["method"] or "",
            "path": fields["path"] or "",
            "url_path": path,
            "query": query,
            "host": fields["authority"] or "",
            "headers": _pairs(request),
            "useragent": fields["user_agent"] or "",
            "id": fields["request_id"] or "",
            "size": fields["bytes_received"] or 0,
            "duration": fields["duration"],
            "protocol": fields["protocol"] or "HTTP/1.1",
        },
        "response": {
            "code": fields["response_code"],
            "flags": fields["response_flags"],
            "code_details": fields["response_code_details"] or "",
            "headers": _pairs(response),
            "size": fields["bytes_sent"] or 0,
        },
        "xds": {"cluster_name": fields["upstream_cluster"] or "", "route_name": fields["route_name"] or ""},
    }


def _pairs(headers: HeaderView | None) -> dict[str, str]:
    raw = getattr(headers, "raw", ())
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}
