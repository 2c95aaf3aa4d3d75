"""Does a process join a real istiod, at a real API server? Identity, calls, mTLS, rules, changes, and a restart."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from real_istiod import HOW, NAMESPACE, PROGRAM, RealIstiod, definitions
from town import eventually

import meshlib
from inbound.inbound_servers import _Server
from kube.real_cluster import RealCluster, own_address
from meshlib.inbound.peer import of_scope
from meshlib.mesh import Mesh
from peers import Peer

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

NETWORKING, SECURITY = "networking.istio.io", "security.istio.io"
REVIEWS = "http://reviews:9080/"
RULE = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
"""
ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http: %s
"""
TO_V1 = "route: [{destination: {host: reviews, subset: v1}}]"
TO_V2 = "route: [{destination: {host: reviews, subset: v2}}]"
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews}
spec:
  selector: {matchLabels: {app: reviews}}
  %s
"""
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
"""
MARKER = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: marker}
spec:
  selector: {matchLabels: {app: reviews}}
  action: DENY
  rules: [{to: [{operation: {paths: [/marker-%d]}}]}]
"""
MARKED = "{to: [{operation: {paths: ['/marker-*']}}]}"
"""Lets the marker be what denies it."""
BY_NAME = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: elsewhere}
spec: {hosts: [localhost], ports: [{number: %d, name: http, protocol: HTTP}], resolution: DNS}
"""
UNSEEN = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default}
spec: {egress: [{hosts: [./reviews.shop.svc.cluster.local]}]}
"""
CALLER = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/productpage"


@pytest.fixture(scope="module")
def istiod(running_cluster: RealCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealIstiod]:
    if not PROGRAM.exists() or definitions() is None:
        pytest.skip(HOW)
    try:
        with RealIstiod(running_cluster, tmp_path_factory.mktemp("istiod")) as found:
            yield found
    finally:
        running_cluster.wipe()


def member(istiod: RealIstiod, account: str, **settings: Any) -> Mesh:
    roots, token = istiod.mounted(account)
    given = {"cache_dir": "-", "service_account": account, **settings}
    return meshlib.connect(
        istiod.target,
        dialect="istio",
        namespace=NAMESPACE,
        identity="control-plane",
        identity_timeout=60,
        ca_roots=str(roots),
        token_file=str(token),
        **given,
    )


@contextlib.contextmanager
def reviews(istiod: RealIstiod, version: str, host: str) -> Iterator[str]:
    """Serves as that version at the host; yields its `address:port`. It says who called, and fails on demand."""
    calls: Counter[str] = Counter()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        identity = of_scope(scope).identity
        calls[headers.get("x-call", "")] += 1
        said = {"version": version, "caller": str(identity), "calls": calls[headers.get("x-call", "")]}
        status = 503 if said["calls"] <= int(headers.get("x-fail", "0")) else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})

    name, labels = f"reviews-{version}", {"app": "reviews", "version": version}
    marked = {**labels, "security.istio.io/tlsMode": "istio"}
    # asyncio sets TCP_NODELAY only where the socket says that it is TCP's: 40 ms a call.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind((host, 0))
        port = int(listening.getsockname()[1])
        if host == own_address():
            istiod.pod(name, "reviews", marked, port)
            istiod.endpoint_slice("reviews", name, port)
        else:
            istiod.workload_entry(name, "reviews", marked, host, port)
        settings = {"pod": name, "workload": name, "labels": tuple(labels.items()), "address": f"{host}:{port}"}
        with member(istiod, "reviews", **settings) as mesh:
            config = uvicorn.Config(mesh.asgi(app), log_level="critical", lifespan="off", http=mesh.listening.uvicorn)
            server = _Server(config)
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            try:
                assert server.is_up.wait(30)
                yield settings["address"]
            finally:
                server.should_exit = True
                thread.join(30)


@pytest.fixture(scope="module")
def town(istiod: RealIstiod) -> Iterator[dict[str, str]]:
    """Two versions of one service, and where each is: a pod, and a machine outside."""
    istiod.service("reviews")
    with reviews(istiod, "v1", own_address()) as one, reviews(istiod, "v2", "127.0.0.2") as two:
        yield {"v1": one, "v2": two}


class Caller:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def get(self, path: str = "", **headers: str) -> httpx.Response:
        return self._client.get(
            REVIEWS + path, headers={name.replace("_", "-"): each for name, each in headers.items()}
        )

    def fetch(self, url: str) -> httpx.Response:
        return self._client.get(url)

    def versions(self, count: int, **headers: str) -> Counter[str]:
        found = Counter[str]()
        for _ in range(count):
            answer = self.get(**headers)
            found[answer.json()["version"] if answer.status_code == 200 else str(answer.status_code)] += 1
        return found

    def until(self, wanted: Callable[[httpx.Response], bool], what: str, path: str = "", **headers: str) -> None:
        def is_so() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return wanted(self.get(path, **headers))
            return False

        eventually(is_so, what)


_numbers = itertools.count(1)


def in_force(istiod: RealIstiod, caller: Caller) -> None:
    """What was applied before is known to both servers: a rule that came after it is."""
    number = next(_numbers)
    istiod.apply(MARKER % number)
    marked = f"marker-{number}"
    eventually(lambda: all(caller.get(marked).status_code == 403 for _ in range(4)), "the rules are in force")


@pytest.fixture
def caller(istiod: RealIstiod, town: dict[str, str]) -> Iterator[Caller]:
    """Of the account productpage. Afterwards nothing is configured any more, and nobody has refused anything."""
    before = istiod.rejected()
    with member(istiod, "productpage") as mesh, mesh.Client(timeout=30) as client:
        found = Caller(client)
        found.until(lambda answer: answer.status_code == 200, "reviews is called")
        yield found
    for kind, name, group in (
        ("VirtualService", "reviews", NETWORKING),
        ("DestinationRule", "reviews", NETWORKING),
        ("PeerAuthentication", "default", SECURITY),
        ("AuthorizationPolicy", "reviews", SECURITY),
        ("AuthorizationPolicy", "marker", SECURITY),
    ):
        istiod.delete(kind, name, group)
    assert istiod.rejected() == before


def test_routes_by_header_and_weight_change_while_calls_run(istiod: RealIstiod, caller: Caller) -> None:
    istiod.apply(
        RULE + "---" + ROUTES % f"[{{match: [{{headers: {{end-user: {{exact: jason}}}}}}], {TO_V2}}}, {{{TO_V1}}}]"
    )
    eventually(lambda: set(caller.versions(5, end_user="jason")) == {"v2"}, "jason sees v2")
    assert set(caller.versions(10)) == {"v1"}
    istiod.apply(
        ROUTES % "[{route: [{destination: {host: reviews, subset: v1}, weight: 20},"
        " {destination: {host: reviews, subset: v2}, weight: 80}]}]"
    )
    eventually(lambda: "v2" in caller.versions(5), "the weights are in force")
    shares = caller.versions(300)
    assert shares["v1"] + shares["v2"] == 300
    assert 200 < shares["v2"] < 280


def test_timeouts_retries_and_faults(istiod: RealIstiod, caller: Caller) -> None:
    istiod.apply(RULE + "---" + ROUTES % f"[{{retries: {{attempts: 2, retryOn: 5xx}}, {TO_V1}}}]")
    eventually(lambda: set(caller.versions(5)) == {"v1"}, "the route is in force")
    answer = caller.get(x_fail="1", x_call="retried")
    assert (answer.status_code, answer.json()["calls"]) == (200, 2)
    istiod.apply(ROUTES % f"[{{fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}, {TO_V1}}}]")
    caller.until(lambda answer: answer.status_code == 418, "the fault is injected")
    istiod.apply(
        ROUTES % f"[{{timeout: 300ms, fault: {{delay: {{fixedDelay: 2s, percentage: {{value: 100}}}}}}, {TO_V1}}}]"
    )
    begun = time.monotonic()
    caller.until(lambda answer: answer.status_code in (200, 504), "the delay is in force")
    assert time.monotonic() - begun >= 0.3


def test_strict_mtls_and_who_may_call(istiod: RealIstiod, caller: Caller, town: dict[str, str]) -> None:
    """With certificates of istiod's own CA at both ends."""
    assert caller.get().json()["caller"] == CALLER
    istiod.apply(STRICT)

    def is_refused(version: str) -> bool:
        try:
            httpx.get(f"http://{town[version]}/", trust_env=False, timeout=30)
        except httpx.HTTPError:
            return True
        return False

    eventually(lambda: is_refused("v1") and is_refused("v2"), "plaintext is refused")
    assert caller.get().json()["caller"] == CALLER
    istiod.apply(POLICY % "action: DENY\n  rules: [{to: [{operation: {paths: [/closed]}}]}]")
    caller.until(lambda answer: answer.status_code == 403, "what is closed is denied", "closed")
    assert caller.get("closed").text == "RBAC: access denied"
    assert caller.get().status_code == 200
    istiod.apply(POLICY % f"rules: [{{from: [{{source: {{principals: [cluster.local/ns/{NAMESPACE}/sa/someone]}}}}]}}]")
    caller.until(lambda answer: answer.status_code == 403, "productpage is no longer allowed")
    istiod.apply(POLICY % f"rules: [{{from: [{{source: {{namespaces: [{NAMESPACE}]}}}}]}}]")
    caller.until(lambda answer: answer.status_code == 200, "its namespace is allowed")


def test_each_kind_of_rule_is_read_as_istiod_writes_it(istiod: RealIstiod, caller: Caller) -> None:
    """Templates of paths, and conditions on what no filter here finds out, which never allow."""
    istiod.apply(POLICY % f"rules: [{{to: [{{operation: {{paths: ['/a/{{*}}/c', '/x/{{**}}']}}}}]}}, {MARKED}]")
    caller.until(lambda answer: answer.status_code == 403, "the rest is denied")
    assert [caller.get(path).status_code for path in ("a/b/c", "x/1/2", "a/b/d/c")] == [200, 200, 403]
    rules = {
        f"from: [{{source: {{serviceAccounts: [{NAMESPACE}/productpage]}}}}]": 200,
        f"from: [{{source: {{notNamespaces: [{NAMESPACE}]}}}}]": 403,
        f"from: [{{source: {{ipBlocks: [127.0.0.0/8, {own_address()}]}}}}]": 200,
        "from: [{source: {requestPrincipals: ['*']}}]": 403,
        "to: [{operation: {hosts: ['reviews*'], methods: [GET], notPaths: [/closed]}}]": 200,
        "when: [{key: source.trustDomain, values: [cluster.local]}]": 200,
        "when: [{key: 'request.headers[x-user]', notValues: ['j*']}]": 200,
        "when: [{key: connection.sni, values: ['outbound_.9080_*']}]": 200,
        "when: [{key: 'experimental.envoy.filters.a.b[c]', values: [x]}]": 403,
    }
    for rule, status in rules.items():
        istiod.apply(POLICY % f"rules: [{{{rule}}}, {MARKED}]")
        in_force(istiod, caller)
        assert caller.get().status_code == status, rule


def test_what_istiod_leaves_out_for_clients_without_a_proxy(istiod: RealIstiod, caller: Caller) -> None:
    """The limits of the how-to, as they are; what a later istiod sends is to be found out here."""
    for spec, status in (
        ("rules: []", 200),  # and it is meant to let nobody in
        ("action: AUDIT\n  rules: [{}]", 200),
        ("action: CUSTOM\n  provider: {name: nobody}\n  rules: [{}]", 200),
        (f"rules: [{{from: [{{source: {{principals: [nobody]}}}}]}}, {MARKED}]", 403),
    ):
        istiod.apply(POLICY % spec)
        in_force(istiod, caller)
        assert caller.get().status_code == status, spec
    istiod.delete("AuthorizationPolicy", "reviews", SECURITY)
    with Peer() as outside:
        url = f"http://localhost:{outside.port}/"
        istiod.apply(BY_NAME % outside.port)
        eventually(lambda: caller.fetch(url).status_code == 503, "an entry by name has no endpoints")
        istiod.apply(UNSEEN)
        eventually(lambda: caller.fetch(url).status_code == 200, "what no Sidecar lets us see is not the mesh's")
    istiod.delete("Sidecar", "default", NETWORKING)
    istiod.delete("ServiceEntry", "elsewhere", NETWORKING)


def test_what_was_good_stays_while_istiod_is_away(istiod: RealIstiod, caller: Caller, tmp_path: Path) -> None:
    istiod.apply(RULE + "---" + ROUTES % f"[{{{TO_V2}}}]")
    eventually(lambda: set(caller.versions(5)) == {"v2"}, "all calls go to v2")
    istiod.stop()
    try:
        assert caller.versions(20) == {"v2": 20}
    finally:
        istiod.start()
    istiod.apply(ROUTES % f"[{{{TO_V1}}}]")
    eventually(lambda: set(caller.versions(5)) == {"v1"}, "changes come again")
