"""Two processes of a mesh whose control plane is an istiod: certificates, calls, mTLS and rules by its own messages."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from town import eventually

import meshlib
from inbound.inbound_servers import _Server
from istiod import Istiod, Rules, Service, policy
from meshlib.inbound.peer import of_scope
from meshlib.mesh import Mesh
from peers import Peer

pytestmark = pytest.mark.timeout(120)
CALLER = "cluster.local/ns/default/sa/productpage"


@pytest.fixture
def istiod() -> Iterator[Istiod]:
    with Istiod() as found:
        yield found


def member(istiod: Istiod, folder: Path, name: str, **settings: Any) -> Mesh:
    """A pod's process: the token and the roots are the files that Kubernetes mounts."""
    (folder / "root-cert.pem").write_bytes(istiod.ca.root)
    (folder / name).write_text(istiod.token("default", name))
    return meshlib.connect(
        istiod.target,
        dialect="istio",
        service_account=name,
        cache_dir="-",
        identity="control-plane",
        ca_roots=str(folder / "root-cert.pem"),
        token_file=str(folder / name),
        **settings,
    )


@contextlib.contextmanager
def reviews(istiod: Istiod, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A service under istiod's rules; yields its `address:port` and who has called it."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(str(of_scope(scope).identity))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"well"})

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with member(istiod, folder, "reviews", address=address) as mesh:
            config = uvicorn.Config(mesh.asgi(app), log_level="critical", lifespan="off", http=mesh.listening.uvicorn)
            server = _Server(config)
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            try:
                assert server.is_up.wait(30)
                yield address, seen
            finally:
                server.should_exit = True
                thread.join(30)


def answered(client: httpx.Client, path: str, status: int) -> Callable[[], bool]:
    def is_so() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return client.get(f"http://reviews:9080{path}").status_code == status
        return False

    return is_so


@pytest.mark.parametrize("destination_rule", [False, True], ids=["auto-mtls", "istio-mutual"])
def test_two_processes_join_an_istiod(istiod: Istiod, tmp_path: Path, destination_rule: bool) -> None:
    """Certificates come from its CA, calls find the service by mTLS, DENY and ALLOW hold, and an edit is live."""
    with (
        reviews(istiod, tmp_path) as (address, seen),
        member(istiod, tmp_path, "productpage") as caller,
        caller.Client(timeout=30) as client,
    ):
        host, _, port = address.partition(":")
        istiod.rules[address] = Rules(
            deny={"default-closed-0": policy(path="/closed")}, allow={"default-callers-0": policy(principal=CALLER)}
        )
        istiod.services.append(
            Service(
                "reviews",
                endpoints=[(host, int(port))],
                takes_mtls=not destination_rule,
                istio_mutual=destination_rule,
                sans=["spiffe://cluster.local/ns/default/sa/reviews"] if destination_rule else [],
            )
        )
        istiod.push()
        eventually(answered(client, "/", 200), "reviews is called")
        assert set(seen) == {f"spiffe://{CALLER}"}
        denied = client.get("http://reviews:9080/closed")
        assert (denied.status_code, denied.text) == (403, "RBAC: access denied")
        with pytest.raises(httpx.HTTPError):  # STRICT
            httpx.get(f"http://{address}/", trust_env=False, timeout=30)
        istiod.rules[address] = Rules(allow={"default-callers-0": policy(namespace="other")})
        istiod.push()
        eventually(answered(client, "/", 403), "productpage is no longer allowed")
        istiod.rules[address] = Rules(allow={"default-callers-0": policy(namespace="default")})
        istiod.push()
        eventually(answered(client, "/closed", 200), "all of the namespace are allowed everything")
        assert istiod.nacks.empty()
        assert {node.metadata["SERVICE_ACCOUNT"] for node in istiod.nodes} == {"reviews", "productpage"}


def test_a_process_joins_by_its_environment(istiod: Istiod, tmp_path: Path) -> None:
    """Another interpreter with nothing but the settings of the how-to; what istiod does not know is called all the
    same."""
    program = (
        "import meshlib, sys\nwith meshlib.connect() as mesh, mesh.Client(timeout=30) as client:\n"
        "    print(*(client.get(each).text for each in sys.argv[1:]))"
    )
    with reviews(istiod, tmp_path) as (address, seen), Peer() as outside:
        host, _, port = address.partition(":")
        istiod.rules[address] = Rules(allow={"default-callers-0": policy(principal=CALLER)})
        istiod.services.append(Service("reviews", endpoints=[(host, int(port))], takes_mtls=True))
        istiod.push()
        (tmp_path / "productpage").write_text(istiod.token("default", "productpage"))
        environment = {
            "PATH": os.environ["PATH"],
            "MESHLIB_CONTROL_PLANE": istiod.target,
            "MESHLIB_DIALECT": "istio",
            "MESHLIB_IDENTITY": "control-plane",
            "MESHLIB_CA_ROOTS": str(tmp_path / "root-cert.pem"),
            "MESHLIB_TOKEN_FILE": str(tmp_path / "productpage"),
            "MESHLIB_SERVICE_ACCOUNT": "productpage",
            "MESHLIB_CACHE_DIR": "-",
        }
        urls = ("http://reviews:9080/", f"http://127.0.0.1:{outside.port}/")
        found = subprocess.run(
            [sys.executable, "-c", program, *urls],
            env=environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert found.stdout.split() == ["well", "ok"], found.stderr
        assert seen == [f"spiffe://{CALLER}"]


def test_rules_that_cannot_be_read_are_refused_by_name(istiod: Istiod, tmp_path: Path) -> None:
    """The last good ones stay, and the NACK names the field; where there are none from before, nobody gets in."""
    with reviews(istiod, tmp_path) as (address, _):
        istiod.rules[address] = Rules(strict=False, deny={"default-closed-0": policy(path="/closed")})
        istiod.push()

        def status(path: str, wanted: int) -> Callable[[], bool]:
            return lambda: httpx.get(f"http://{address}{path}", trust_env=False, timeout=30).status_code == wanted

        eventually(status("/closed", 403), "what is closed is denied")
        eventually(status("/", 200), "the rest is not")
        strange = policy(path="/")
        strange.condition.const_expr.bool_value = True
        istiod.rules[address] = Rules(strict=False, deny={"default-strange-0": strange})
        istiod.push()
        nack = istiod.nacks.get(timeout=60).error_detail.message
        assert "policies[default-strange-0]" in nack
        assert status("/closed", 403)()


def test_the_token_is_read_at_each_use(istiod: Istiod, tmp_path: Path) -> None:
    """A platform renews it: the stream after the next one shows what the file holds then."""
    with member(istiod, tmp_path, "productpage") as mesh:
        assert mesh.wait_for_credentials(60) is not None
        eventually(lambda: bool(istiod.nodes), "a stream is open")
        renewed = istiod.token("default", "productpage", number=2)
        (tmp_path / "productpage").write_text(renewed)
        istiod.drop_streams()
        eventually(lambda: ("StreamAggregatedResources", renewed) in istiod.tokens, "the new token is shown")


def test_a_token_for_someone_else_is_no_token(istiod: Istiod, tmp_path: Path) -> None:
    """Audience istio-ca: the API server's own token gives no certificate, and no configuration."""
    with member(istiod, tmp_path, "productpage", identity_timeout=1.0) as mesh:
        (tmp_path / "productpage").write_text(istiod.token("default", "productpage", audience="kubernetes"))
        assert mesh.wait_for_credentials(1.0) is None
        assert not istiod.nodes
