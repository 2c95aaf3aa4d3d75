"""Whose processes may be looked into?"""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from meshlib.controlplane.access_rules import EVERYTHING, Powers, Role
from meshlib.controlplane.inspection import Client, Configuration, Inspection, Secrets
from meshlib.xds.resource_types import CLUSTER

CLIENTS = (
    Client(
        "a-1.default",
        "id-1",
        "a",
        "default",
        "1",
        ((CLUSTER, b"sent"),),
        lambda: ((CLUSTER, b"sent"), (CLUSTER, b"more")),
    ),
    Client("a-2.dev", "id-2", "a", "dev", "1", (), lambda: ()),
)


def certificate(process: str, name: str, serial: str, begins: int) -> tuple[str, dict[str, str], float]:
    told = {"resource": name, "serial": serial, "not_before": str(begins), "not_after": str(begins + 100)}
    return "meshlib_certificate_info", {**instance_of(process), **told}, 1.0


def instance_of(process: str) -> dict[str, str]:
    return {"service.instance.id": process, "service.namespace": "dev" if process == "id-2" else "default"}


GAUGES = (
    certificate("id-1", "ROOTCA", "9", 1),
    certificate("id-1", "default", "1", 10),
    certificate("id-1", "default", "2", 60),
    certificate("id-2", "default", "3", 70),
    ("meshlib_certificate_info", {**certificate("id-1", "default", "7", 80)[1], "service.namespace": "dev"}, 1.0),
    ("meshlib_certificate_info", {**certificate("id-1", "default", "8", 90)[1], "not_after": "soon"}, 1.0),
    ("meshlib_certificate_info", instance_of("id-1"), 1.0),
    ("meshlib_xds_connected", instance_of("id-1"), 1.0),
)


async def asked(powers: Powers, path: str = "config", **query: str) -> tuple[int, str]:
    app = Starlette(routes=Inspection(lambda: CLIENTS, lambda: GAUGES).routes())

    async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["admission"] = SimpleNamespace(powers=powers)
        await app(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(admitted), base_url="http://plane") as client:
        answer = await client.get(f"/v1/{path}", params=query)
        return answer.status_code, answer.text


async def test_only_what_the_reader_may_see_is_there() -> None:
    """An operator of one namespace finds no process of another, by neither name, and is not told that there is one; a
    viewer finds none, since what was sent has credentials in it."""
    viewer = Powers(((Role.VIEWER, frozenset({"dev"})),))
    assert (await asked(viewer, of="a"))[0] == 404
    operator = Powers(((Role.OPERATOR, frozenset({"dev"})),))
    assert (await asked(operator, of="a"))[0] == 200
    status, told = await asked(operator, of="a-1.default")
    assert (status, "there are: a-2.dev" in told, "default, " in told) == (404, True, False)
    assert (await asked(EVERYTHING, of="a-1.default"))[0] == 200
    assert '"alike":1' in (await asked(operator, of="a"))[1]
    assert '"alike":2' in (await asked(EVERYTHING, of="a"))[1]


async def test_which_certificates_a_process_tells_of() -> None:
    """The newest of its own and the roots, for operators of its namespace; nothing of another process, nor what one in
    another namespace says of it, nor what is no certificate."""
    told = msgspec.json.decode((await asked(EVERYTHING, "secrets", of="a-1.default"))[1], type=Secrets)
    assert [(each.name, each.serial, each.not_after) for each in told.secrets] == [
        ("default", "2", 160),
        ("ROOTCA", "9", 101),
    ]
    operator = Powers(((Role.OPERATOR, frozenset({"dev"})),))
    assert (await asked(operator, "secrets", of="a-1.default"))[0] == 404


async def test_sent_or_visible() -> None:
    """What it holds, or what it would be given."""
    for scope, count in (("", 1), ("sent", 1), ("visible", 2)):
        told = msgspec.json.decode((await asked(EVERYTHING, of="a-1.default", scope=scope))[1], type=Configuration)
        assert told.resources == ((CLUSTER, b"sent"), (CLUSTER, b"more"))[:count]


@pytest.mark.parametrize(
    ("query", "reason"),
    [({}, "of is missing"), ({"off": "a"}, "unknown parameter off"), ({"of": "a", "scope": "all"}, "sent and visible")],
)
async def test_a_question_that_is_none_is_refused(query: dict[str, str], reason: str) -> None:
    """What was asked, and what there is."""
    status, told = await asked(EVERYTHING, **query)
    assert (status, reason in told) == (400, True)
