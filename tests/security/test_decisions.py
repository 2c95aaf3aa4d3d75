"""The table of decisions, by the guard itself and through ASGI and WSGI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshlib.inbound.peer import PEER
from meshlib.model import Headers, Request, Snapshot
from meshlib.policy.admission import Allow
from meshlib.policy.guard import Guard
from security.decisions import DECISIONS, SLEEP, Decision, inbound
from snapshots import mesh

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
            status = asyncio.run(_asgi(made.asgi(_app), given))
        if (status == 200) is not given.is_allowed:
            wrong.append((given, status))
    assert not wrong


async def _asgi(app: Any, given: Decision) -> int:
    method, _, target = given.target.partition(" ")
    path, _, query = target.partition("?")
    pairs = [(b"host", given.host.encode()), *((n.encode(), v.encode()) for n, v in given.headers)]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": pairs, "scheme": "http", "extensions": {PEER: given.peer},
    }  # fmt: skip
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, None, send)
    status: int = sent[0]["status"]
    return status


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


def test_a_denial_names_rule_file_and_line() -> None:
    """What a person needs to find the rule."""
    guard = Guard([inbound("{action: DENY, rules: [{}]}")])
    verdict = guard.admit(Request("GET", "http", "reviews", "/", Headers()), SLEEP, 0.0)
    assert verdict.status == 403 and verdict.body == b"RBAC: access denied"  # type: ignore[union-attr]
    assert verdict.details == "rbac_access_denied_matched_policy[ns[default]-policy[p]-rule[0]]"  # type: ignore[union-attr]
    assert verdict.origin == "AuthorizationPolicy default/p (p.yaml:4)"  # type: ignore[union-attr]
