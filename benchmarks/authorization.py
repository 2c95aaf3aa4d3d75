"""What does it cost to say who may call? `python -m benchmarks.authorization`, in microseconds: a decision of the guard
among many policies, and a request through the ASGI and WSGI middleware with and without rules.

Nothing is on the wire. Contestants take turns round by round; each figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from joserfc import jwt
from joserfc.jwk import RSAKey

from meshlib.inbound.peer import PEER
from meshlib.istio.parse import parse_text
from meshlib.istio.translate import translate
from meshlib.mesh import Mesh
from meshlib.model import Headers, Inbound, Node, Peer, Request, Snapshot, SpiffeId, Workload
from meshlib.policy.guard import Guard
from meshlib.settings import Settings

CALLER = Peer(SpiffeId.of("cluster.local", "default", "productpage"), True, "10.0.0.9", 9080)
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p{number:03}, namespace: default}}
spec:
  action: {action}
  rules:
  - from: [{{source: {{principals: ["cluster.local/ns/default/sa/{who}"]}}}}]
    to: [{{operation: {{methods: [GET], paths: ["{path}"]}}}}]
---
"""
KEY = RSAKey.generate_key(2048, {"kid": "one"}, auto_kid=False)
TOKENS = """
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: default}
spec: {jwtRules: [{issuer: me, jwks: '%s'}]}
"""


def inbound(text: str) -> Inbound:
    parsed = parse_text(text, "benchmark.yaml")
    assert not parsed.problems, parsed.problems
    return translate(parsed.objects, (), Node("n", Workload("reviews"))).snapshot.inbound[0]


def policies(count: int, *, deny: bool = False) -> str:
    """Of which the last alone allows the call; or, with `deny`, none denies it."""
    made = [
        POLICY.format(number=n, action="DENY" if deny else "ALLOW", who=f"stranger-{n}", path=f"/{n}/*")
        for n in range(count if deny else count - 1)
    ]
    made.append(POLICY.format(number=count, action="ALLOW", who="productpage", path="/reviews/*"))
    return "".join(made)


def request(path: str = "/reviews/0", token: str = "") -> Request:
    raw = [(b"host", b"reviews:9080"), (b"user-agent", b"x"), (b"x-request-id", b"1")]
    return Request(
        "GET",
        "http",
        "reviews:9080",
        path,
        Headers([*raw, (b"authorization", f"Bearer {token}".encode())] if token else raw),
    )


def decisions() -> dict[str, Callable[[], object]]:
    now = 1_000_000.0
    token = jwt.encode({"alg": "RS256", "kid": "one"}, {"iss": "me", "sub": "jane", "exp": int(now) + 600}, KEY)
    jwks = json.dumps({"keys": [KEY.as_dict(private=False)]})
    found: dict[str, Callable[[], object]] = {}

    def add(name: str, text: str, asked: Request) -> None:
        guard = Guard([inbound(text)])
        assert type(guard.admit(asked, CALLER, now)).__name__ == "Allow", name
        found[name] = lambda: guard.admit(asked, CALLER, now)

    add("no rules", "", request())
    add("1 policy", policies(1), request())
    add("100 policies, the last allows", policies(100), request())
    add("100 DENY policies, and one that allows", policies(100, deny=True), request())
    add("100 policies, a path in two readings", policies(100), request("/reviews/..%2freviews/0"))
    add("a token (RS256)", TOKENS % jwks, request(token=token))
    return found


async def _asgi(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _wsgi(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b""]


async def _nothing(message: Any = None) -> Any:
    return None


def inbound_calls(meshes: dict[str, Mesh]) -> dict[str, Callable[[], object]]:
    """Through the middleware, around an application that does nothing."""
    asked = request()
    scope = {
        "type": "http", "method": "GET", "path": "/reviews/0", "raw_path": b"/reviews/0", "query_string": b"",
        "headers": list(asked.headers.raw), "scheme": "http", "extensions": {PEER: CALLER},  # type: ignore[attr-defined]
    }  # fmt: skip
    environ = {
        "REQUEST_METHOD": "GET", "RAW_URI": "/reviews/0", "PATH_INFO": "/reviews/0", "HTTP_HOST": "reviews:9080",
        "HTTP_USER_AGENT": "x", "HTTP_X_REQUEST_ID": "1", PEER: CALLER,
    }  # fmt: skip

    def run(app: Any) -> None:
        try:
            app(scope, _nothing, _nothing).send(None)  # nothing waits: no loop is needed
        except StopIteration:
            pass

    def serve(app: Any) -> None:
        app(dict(environ), lambda *_: None)

    found: dict[str, Callable[[], object]] = {"ASGI, bare": lambda: run(_asgi), "WSGI, bare": lambda: serve(_wsgi)}
    for name, mesh in meshes.items():
        app, other = mesh.asgi(_asgi), mesh.wsgi(_wsgi)
        found[f"ASGI, {name}"] = lambda app=app: run(app)  # type: ignore[misc]
        found[f"WSGI, {name}"] = lambda app=other: serve(app)  # type: ignore[misc]
    return found


def measured(contestants: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of one call."""
    sizes: dict[str, int] = {}
    for name, call in contestants.items():
        began, size = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            call()
            size += 1
        sizes[name] = size
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            began = time.perf_counter()
            for _ in range(sizes[name]):
                call()
            costs[name].append((time.perf_counter() - began) / sizes[name] * 1e6)
    return {name: statistics.median(cost) for name, cost in costs.items()}


def rows(rounds: int, seconds: float) -> Iterable[tuple[str, float]]:
    yield from measured(decisions(), rounds, seconds).items()
    given = {"no rules": "", "100 policies": policies(100)}
    meshes = {name: Mesh(Settings(telemetry="")) for name in given}
    try:
        for name, mesh in meshes.items():
            mesh.start()
            mesh._feed.publish(Snapshot("1", inbound=(inbound(given[name]),), complete=True))
        yield from measured(inbound_calls(meshes), rounds, seconds).items()
    finally:
        for mesh in meshes.values():
            mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    quick = parser.parse_args().quick
    for name, microseconds in rows(*((2, 0.005) if quick else (15, 0.1))):
        print(f"{name:<42} {microseconds:8.1f} us")


if __name__ == "__main__":
    main()
