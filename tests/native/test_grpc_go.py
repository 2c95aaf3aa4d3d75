"""Does grpc-go find its way by our control plane? Its client and its server, by Istio's YAML and `meshctl bootstrap`;
grpc-go is the judge of what it is sent, and refuses nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from go_grpc import MISSING, PEER, GoClient, go_client, go_server
from stock_grpc import Village
from test_stock_grpc_security import FRIEND, FRIEND_MAY_SAY, STRICT

from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not PEER.exists(), reason=MISSING),
]

SERVICE = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: town, namespace: default}}
spec:
  hosts: [town.test]
  ports: [{{number: 80, name: grpc, protocol: GRPC}}]
  resolution: STATIC
  endpoints:
  - {{address: 127.0.0.1, ports: {{grpc: {one}}}, labels: {{version: v1}}}}
  - {{address: 127.0.0.1, ports: {{grpc: {two}}}, labels: {{version: v2}}}}
"""
RULE = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: town, namespace: default}
spec:
  host: town.test
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
  trafficPolicy: %s
"""
ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: town, namespace: default}
spec:
  hosts: [town.test]
  http: %s
"""
SHARES = """
apiVersion: meshlib.io/v1alpha1
kind: BackendTrafficPolicy
metadata: {name: town, namespace: default}
spec:
  host: town.test
  outlierDetection:
    failurePercentageEnforcing: 100
    failurePercentageMinimumHosts: 1
    failurePercentageRequestVolume: 5
"""
BY_SEGMENTS = """
apiVersion: v1
kind: Service
metadata: {{name: echo, namespace: default}}
spec:
  selector: {{app: echo}}
  ports: [{{name: grpc, port: {port}}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: echo, namespace: default}}
spec:
  parentRefs: [{{group: "", kind: Service, name: echo, port: {port}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /echo.Echo}}}}]
    backendRefs: [{{name: echo, port: {port}}}]
    timeouts: {{request: 7s}}
"""
TO_V1, TO_V2 = (
    "route: [{destination: {host: town.test, subset: v1}}]",
    "route: [{destination: {host: town.test, subset: v2}}]",
)


@pytest.fixture
async def village(tmp_path: Path) -> AsyncIterator[Village]:
    plane = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
    await plane.start()
    async with AsyncExitStack() as stack:
        yield Village(plane, tmp_path, stack)
    await plane.stop()


class Town:
    """Two servers that know nothing of xDS, and a client that knows nothing else."""

    def __init__(self, village: Village, client: GoClient) -> None:
        self.apply, self.accepted = village.admin.apply, village.admin.assert_accepted
        self.client = client
        self.call, self.calls, self.until = client.call, client.calls, client.until

    async def rule(self, policy: str) -> None:
        await self.apply(RULE % policy)

    async def servers(self, count: int, **order: Any) -> set[str]:
        return {each.server for each in await self.calls(count, **order)}

    async def until_told(self, *expected: tuple[str, dict[str, str]]) -> None:
        """Each metadata leads to its server, and to no other: all at once, since a client that has just begun knows one
        server only. Then they do so once more."""
        async with asyncio.timeout(60):
            while not await self._is_told(expected):
                pass
        assert await self._is_told(expected)

    async def _is_told(self, expected: tuple[tuple[str, dict[str, str]], ...]) -> bool:
        return all([await self.servers(10, metadata=told) == {server} for server, told in expected])

    async def routes(self, http: str) -> None:
        await self.apply(ROUTES % http)


@pytest.fixture
async def town(village: Village) -> AsyncIterator[Town]:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(go_server("127.0.0.1:0", name, None)) for name in ("one", "two")]
        ports = {name: address.rpartition(":")[2] for name, address in (("one", one), ("two", two))}
        await village.admin.apply(SERVICE.format(**ports))
        await village.admin.apply(RULE % "{}")
        client = await stack.enter_async_context(go_client("town.test:80", village.bootstrap("c", certificates=False)))
        yield Town(village, client)


async def test_a_go_client_follows_headers_and_weights(town: Town) -> None:
    await town.routes(f"[{{match: [{{headers: {{end-user: {{exact: jason}}}}}}], {TO_V2}}}, {{{TO_V1}}}]")
    await town.until_told(("two", {"end-user": "jason"}), ("one", {}))
    await town.routes(
        "[{route: [{destination: {host: town.test, subset: v1}, weight: 80},"
        " {destination: {host: town.test, subset: v2}, weight: 20}]}]"
    )
    await town.until(lambda told: told.server == "two")
    await town.calls(50)
    shares = Counter(each.server for each in await town.calls(1000, at_once=4))
    assert shares["one"] + shares["two"] == 1000
    assert 140 < shares["two"] < 260
    await town.accepted()


async def test_a_go_client_sends_one_user_to_one_endpoint(town: Town) -> None:
    await town.rule("{loadBalancer: {consistentHash: {httpHeaderName: x-user}}}")
    async with asyncio.timeout(60):
        while max(map(len, homes := await _homes(town))) > 1 or set.union(*homes) != {"one", "two"}:
            pass  # until the rule has come
    assert await _homes(town) == homes
    await town.accepted()


async def _homes(town: Town) -> list[set[str]]:
    """Of twenty users: the servers that each came to."""
    return [await town.servers(5, metadata={"x-user": str(user)}) for user in range(20)]


async def test_a_go_client_gets_a_fault(town: Town) -> None:
    await town.routes(f"[{{fault: {{abort: {{httpStatus: 503, percentage: {{value: 100}}}}}}, {TO_V1}}}]")
    told = await town.until(lambda told: told.code == "Unavailable")
    await town.routes(f"[{{fault: {{abort: {{grpcStatus: NOT_FOUND, percentage: {{value: 100}}}}}}, {TO_V1}}}]")
    await town.until(lambda told: told.code == "NotFound")
    await town.routes(f"[{{fault: {{delay: {{fixedDelay: 300ms, percentage: {{value: 100}}}}}}, {TO_V1}}}]")
    told = await town.until(lambda told: told.code == "OK")
    assert told.seconds >= 0.3
    await town.accepted()


async def test_a_go_client_tries_again(town: Town) -> None:
    await town.routes(f"[{{retries: {{attempts: 2, retryOn: unavailable}}, {TO_V1}}}]")
    told = await town.until(lambda told: told.code == "OK", metadata={"fail": "UNAVAILABLE", "fail-before": "1"})
    assert told.attempts == "1"
    assert (await town.call(metadata={"fail": "NOT_FOUND", "fail-before": "1"})).code == "NotFound"
    await town.routes(f"[{{retries: {{attempts: 0}}, {TO_V1}}}]")
    await town.until(lambda told: told.code == "Unavailable", metadata={"fail": "UNAVAILABLE", "fail-before": "1"})
    await town.accepted()


async def test_a_go_clients_calls_end_at_the_routes_timeout(town: Town) -> None:
    """grpc-go keeps to it, and its server is told."""
    await town.routes(f"[{{timeout: 1s, {TO_V1}}}]")
    told = await town.until(lambda told: told.deadline != 0, timeout=0)
    assert 0.5 < told.deadline <= 1.0
    told = await town.call(metadata={"wait": "5s"}, timeout=0)
    assert told.code == "DeadlineExceeded"
    assert 0.95 <= told.seconds < 2.5
    told = await town.call(metadata={"wait": "700ms"}, timeout=0)
    assert (told.code, told.message) == ("OK", "")
    assert (await town.call(timeout=0.4)).deadline <= 0.4
    await town.accepted()


async def test_a_go_client_heeds_limits(town: Town) -> None:
    await town.rule("{connectionPool: {http: {http2MaxRequests: 1}}}")
    await town.until(lambda told: told.code == "OK")
    while "Unavailable" not in (
        codes := Counter(each.code for each in await town.calls(4, at_once=4, metadata={"wait": "300ms"}))
    ):
        pass
    assert codes == {"OK": 1, "Unavailable": 3}
    await town.accepted()


async def test_a_go_client_leaves_out_who_fails(town: Town) -> None:
    """By the share that fails (gRFC A50): errors in a row nobody of gRPC's counts."""
    await town.routes("[{retries: {attempts: 0}, route: [{destination: {host: town.test}}]}]")
    await town.rule("{loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: {interval: 1s, maxEjectionPercent: 50}}")
    broken = {"fail": "UNAVAILABLE", "fail-on": "two"}
    async with asyncio.timeout(60):
        while {each.code for each in await town.calls(10, metadata=broken)} != {"OK", "Unavailable"}:
            pass
    await town.apply(SHARES)
    async with asyncio.timeout(60):
        while {each.code for each in await town.calls(20, metadata=broken)} != {"OK"}:
            pass
    await town.accepted()


async def test_a_go_client_understands_what_grpc_has_no_words_for(town: Town) -> None:
    """A header that must not be so, methods: one of them unknown would cost all routes."""
    await town.routes(
        f"""
  - match: [{{withoutHeaders: {{x-user: {{exact: jason}}}}, headers: {{x-way: {{exact: without}}}}}}]
    {TO_V2}
  - match: [{{method: {{exact: GET}}}}, {{queryParams: {{a: {{exact: b}}}}}}]
    fault: {{abort: {{httpStatus: 500, percentage: {{value: 100}}}}}}
    {TO_V2}
  - match: [{{method: {{exact: POST}}, headers: {{x-way: {{exact: method}}}}}}]
    {TO_V2}
  - {TO_V1}
"""
    )
    without = {"x-way": "without"}
    await town.until_told(
        ("two", without),
        ("one", {**without, "x-user": "jason"}),
        ("two", {**without, "x-user": "jack"}),
        ("two", {"x-way": "method"}),
        ("one", {}),
    )
    await town.accepted()


async def test_a_go_server_serves_mtls_and_obeys_an_authorization_policy(village: Village) -> None:
    await village.admin.apply(STRICT + FRIEND_MAY_SAY)
    file = village.bootstrap("echo", MESHLIB_SERVICE="echo", MESHLIB_LABELS="app=echo", MESHLIB_ADDRESS=village.address)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(go_server(village.address, "echo", file))
        await village.admin.until_serving(village.address)
        friend, foe = [
            await stack.enter_async_context(go_client(village.target, village.bootstrap(name)))
            for name in ("friend", "foe")
        ]
        nobody = await stack.enter_async_context(
            go_client(village.target, village.bootstrap("nobody", certificates=False))
        )
        told = await friend.until(lambda told: told.code == "OK")
        assert told.caller == FRIEND
        assert (await friend.call(method="Other")).code == "PermissionDenied"
        assert (await foe.call()).code == "PermissionDenied"
        assert (await nobody.call()).code == "Unavailable"
        await village.admin.assert_accepted()
        await village.admin.apply(FRIEND_MAY_SAY.replace("sa/friend", "sa/foe"))
        await foe.until(lambda told: told.code == "OK")
        assert (await friend.until(lambda told: told.code != "OK")).code == "PermissionDenied"
        await village.admin.apply(BY_SEGMENTS.format(port=village.address.rpartition(":")[2]))
        assert (await foe.until(lambda told: told.deadline != 0, timeout=0)).deadline <= 7
        stock = await village.client("foe")
        await stock.until('{"server":"echo","caller":"spiffe://cluster.local/ns/default/sa/foe"')
        await village.admin.assert_accepted()
