"""What does an external authorizer say? HTTP: its answer's status decides, 200 allows."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import httpx

from meshlib.model import Request
from meshlib.policy.admission import Allow, Authorize, Deny, Verdict

_log = logging.getLogger("meshlib.guard")

_ALWAYS_SENT = ("authorization", "host")
_NOT_COPIED = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive"})


def ask(client: httpx.Client, question: Authorize) -> Verdict | None:
    """None without an answer: no connection, too late, or a status of 500 and more."""
    authorizer, request = question.authorizer, question.request
    if authorizer.kind != "http":
        _log.error("authorizer %s: only HTTP authorizers can be asked", authorizer.name)
        return None
    headers = [(name, value) for name, value in _pairs(request) if _is_named(name, authorizer.request_headers)]
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in authorizer.added_headers]
    headers.append((b"content-length", b"0"))
    url = f"http://{authorizer.host}:{authorizer.port}{authorizer.path_prefix}{request.path}"
    sent = {"host": request.authority.encode("latin-1")}
    try:
        answer = client.send(
            client.build_request(
                request.method,
                url,
                headers=[*headers, *(() if not request.authority else ((b"x-forwarded-host", sent["host"]),))],
                timeout=authorizer.timeout,
            )
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
        16 if answer.status_code == 401 else 7,
        "UAEX",
        "ext_authz_denied",
        reason=f"{authorizer.name} says no",
    )


def _pairs(request: Request) -> Iterable[tuple[bytes, bytes]]:
    raw: Iterable[tuple[bytes, bytes]] = getattr(request.headers, "raw", ())
    return ((name.lower(), value) for name, value in raw)


def _is_named(name: bytes, patterns: tuple[str, ...], always: tuple[str, ...] = _ALWAYS_SENT) -> bool:
    text = name.decode("latin-1")
    if text == "host":
        return False  # of the URL
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
