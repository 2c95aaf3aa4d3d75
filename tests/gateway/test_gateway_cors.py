"""What does a gateway tell browsers? Preflights are answered here; answers bear what a page may read."""

from __future__ import annotations

import httpx
import pytest
from gateways import gateway, url

from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.model import Node, NodeKind, Snapshot, Workload

YAML = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: door, namespace: istio-system}
spec: {selector: {istio: gw}, servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: ['*']}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: istio-system}
spec:
  hosts: ['*']
  gateways: [%s]
  http:
  - directResponse: {status: 204}
    headers: {response: {set: {access-control-allow-origin: "https://of-the-server"}}}
    corsPolicy:
      allowOrigins: [{exact: "https://a.com"}, {prefix: "https://b."}, {regex: "https://c[0-9]+"}]
      allowMethods: [GET, POST]
      allowHeaders: [x-one, x-two]
      exposeHeaders: [x-seen]
      maxAge: 24h
      allowCredentials: true
      unmatchedPreflights: %s
"""
PAGE = {"access-control-allow-origin": "https://a.com", "access-control-allow-credentials": "true"}


def snapshot(unmatched: str = "UNSPECIFIED") -> Snapshot:
    parsed = parse_text(YAML % ("door", unmatched), "cors.yaml")
    assert (parsed.problems, parsed.warnings) == ((), ())
    node = Node("n", Workload("gw", "istio-system", labels=(("istio", "gw"),)), NodeKind.ROUTER)
    return translate(parsed.objects, (), node).snapshot


def told(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


async def test_a_preflight_is_answered_here() -> None:
    """With all that the policy lists; an OPTIONS that asks nothing is the server's."""
    async with gateway(snapshot()) as door, httpx.AsyncClient(timeout=20) as client:
        asking = {"origin": "https://a.com", "access-control-request-method": "PUT"}
        answer = await client.options(url(door), headers=asking)
        assert (answer.status_code, answer.content) == (200, b"")
        assert told(answer) == {
            **PAGE,
            "access-control-allow-methods": "GET,POST",
            "access-control-allow-headers": "x-one,x-two",
            "access-control-max-age": "86400",
        }
        plain = await client.options(url(door), headers={"origin": "https://a.com"})
        assert (plain.status_code, told(plain)) == (204, {**PAGE, "access-control-expose-headers": "x-seen"})


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("https://a.com", True),
        ("https://a.com.evil", False),
        ("https://b.com", True),
        ("https://c12", True),
        ("https://c12.evil", False),
        ("null", False),
    ],
)
async def test_an_answer_says_who_may_read_it(origin: str, is_allowed: bool) -> None:
    """In the place of what the server says; of other origins the server's own word stands, as in Envoy."""
    async with gateway(snapshot()) as door, httpx.AsyncClient(timeout=20) as client:
        answer = await client.get(url(door), headers={"origin": origin})
    assert answer.status_code == 204
    expected = {**PAGE, "access-control-allow-origin": origin, "access-control-expose-headers": "x-seen"}
    assert told(answer) == (expected if is_allowed else {"access-control-allow-origin": "https://of-the-server"})


async def test_who_names_no_origin_is_told_nothing() -> None:
    """A service is no page."""
    async with gateway(snapshot()) as door, httpx.AsyncClient(timeout=20) as client:
        answer = await client.get(url(door))
    assert told(answer) == {"access-control-allow-origin": "https://of-the-server"}


@pytest.mark.parametrize(("unmatched", "status"), [("FORWARD", 204), ("UNSPECIFIED", 204), ("IGNORE", 200)])
async def test_a_preflight_of_a_stranger_goes_on_unless_it_is_ignored(unmatched: str, status: int) -> None:
    """Ignored is answered without a permission."""
    async with gateway(snapshot(unmatched)) as door, httpx.AsyncClient(timeout=20) as client:
        asking = {"origin": "https://evil.com", "access-control-request-method": "GET"}
        answer = await client.options(url(door), headers=asking)
    assert answer.status_code == status
    assert "access-control-allow-methods" not in answer.headers
