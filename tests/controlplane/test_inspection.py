"""Whose processes may be looked into?"""

from __future__ import annotations

from types import SimpleNamespace

import httpx
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from discovery.feed import world
from meshlib.controlplane.access_rules import EVERYTHING, Powers, Role
from meshlib.controlplane.inspection import Client, Inspection

SEEN = world("b:80")
CLIENTS = (Client("a-1.default", "a", "default", (), SEEN), Client("a-2.dev", "a", "dev", (), SEEN))


async def asked(powers: Powers, path: str, **query: str) -> tuple[int, str]:
    app = Starlette(routes=Inspection(lambda: CLIENTS).routes())

    async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["admission"] = SimpleNamespace(powers=powers)
        await app(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(admitted), base_url="http://plane") as client:
        answer = await client.get(path, params=query)
        return answer.status_code, answer.text


async def test_only_what_the_reader_may_see_is_there() -> None:
    """A viewer of one namespace finds no process of another, by neither name, and is not told that there is one."""
    viewer = Powers(((Role.VIEWER, frozenset({"dev"})),))
    for path, more in (("/v1/config", {}), ("/v1/config/explain", {"url": "http://b:80/"})):
        assert (await asked(viewer, path, of="a", **more))[0] == 200
        status, told = await asked(viewer, path, of="a-1.default", **more)
        assert (status, "there are: a-2.dev" in told, "default, " in told) == (404, True, False)
        assert (await asked(EVERYTHING, path, of="a-1.default", **more))[0] == 200
    assert '"alike":1' in (await asked(viewer, "/v1/config", of="a"))[1]
    assert '"alike":2' in (await asked(EVERYTHING, "/v1/config", of="a"))[1]


async def test_a_question_that_is_none_is_refused() -> None:
    """What was asked, and what there is."""
    for path, query, reason in (
        ("/v1/config", {}, "of is missing"),
        ("/v1/config", {"off": "a"}, "unknown parameter off"),
        ("/v1/config/explain", {"of": "a"}, "an absolute URL"),
        ("/v1/config/explain", {"of": "a", "url": "http://b/", "body": "x"}, "unknown parameter body"),
    ):
        status, told = await asked(EVERYTHING, path, **query)
        assert status in (400, 404)
        assert reason in told
