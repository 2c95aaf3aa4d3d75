"""What does an external authorizer say? HTTP: its answer's status decides, 200 allows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from urllib.parse import quote

import httpx

from meshlib.model import Request
from meshlib.policy.admission import Allow, Authorize, Deny, Verdict

_log = logging.getLogger("meshlib.guard")

_ALWAYS_SENT = ("authorization",)
STATUSES = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
"""gRPC's status for HTTP's (grpc/doc/http-grpc-status-mapping.md)."""
_KEPT = "/%~!$&'()*+,;=:@"
_NOT_COPIED = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive"})


def ask(client: httpx.Client, question: Authorize) -> Verdict | None:
    """None without an answer: no connection, too late, or a status of 500 and more."""
    authorizer, request = question.authorizer, question.request
    given = [(name, value) for name, value in pairs(request) if _is_named(name, authorizer.request_headers)]
    added = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in authorizer.added_headers]
    names = {name for name, _ in added}
    headers = [*(pair for pair in given if pair[0] not in names), *added]
    if authorizer.max_body:
        headers.append((b"x-envoy-auth-partial-body", b"true" if question.is_partial else b"false"))
    if request.authority:  # the authorizer is reached by its own name, and told whom the call was made for
        headers.append((b"host", request.authority.encode("latin-1")))
    path, mark, query = (authorizer.path_prefix + request.path).encode("latin-1").partition(b"?")
    target = quote(path, safe=_KEPT) + (mark + query).decode("latin-1")
    try:
        answer = client.request(
            request.method,
            f"http://{authorizer.host}:{authorizer.port}{target}",
            content=question.body,
            headers=[*headers, (b"content-length", b"%d" % len(question.body))],
            timeout=authorizer.timeout,
        )
    except Exception as error:
        _log.warning("authorizer %s: %s", authorizer.name, str(error) or type(error).__name__)
        return None
    if answer.status_code >= 500:
        _log.warning("authorizer %s answered %d", authorizer.name, answer.status_code)
        return None
    given = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _NOT_COPIED]
    if answer.status_code == 200:
        return Allow(
            add=tuple(pair for pair in given if _is_named(pair[0], authorizer.upstream_headers, ())),
            answer=tuple(pair for pair in given if _is_named(pair[0], authorizer.allowed_downstream_headers, ())),
        )
    wanted = authorizer.downstream_headers
    back = given if not wanted else [pair for pair in given if _is_named(pair[0], wanted, ())]
    return Deny(
        answer.status_code,
        answer.content,
        tuple(pair for pair in back if pair[0] not in (b"content-encoding", b"server", b"date")),
        STATUSES.get(answer.status_code, 2),
        "UAEX",
        "ext_authz_denied",
        reason=f"{authorizer.name} says no",
    )


def pairs(request: Request) -> Iterable[tuple[bytes, bytes]]:
    """The request's headers, names in lower case."""
    raw: Iterable[tuple[bytes, bytes]] = getattr(request.headers, "raw", ())
    return ((name.lower(), value) for name, value in raw)


def _is_named(name: bytes, patterns: tuple[str, ...], always: tuple[str, ...] = _ALWAYS_SENT) -> bool:
    text = name.decode("latin-1")
    if text in ("host", "content-length", "transfer-encoding", "connection"):
        return False  # this call's own
    if text in always:
        return True
    for each in patterns:
        wanted = each.lower()
        if (
            text == wanted
            or wanted == "*"
            or (wanted.endswith("*") and text.startswith(wanted[:-1]))
            or (wanted.startswith("*") and text.endswith(wanted[1:]))
        ):
            return True
    return False
