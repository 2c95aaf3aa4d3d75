"""One table over the servers: real processes, started by the line that the documentation gives or by `meshctl run`, in
one mesh whose PeerAuthentication and certificates change under them."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from certificates import TestCA, files_of
from meshlib.identity.credentials import Credentials
from meshlib.identity.tls import TlsContexts
from meshlib.model import UpstreamTls
from peers import unused_port

pytestmark = pytest.mark.processes

PLAIN = """
async def asgi(scope, receive, send):
    if scope["type"] == "http":
        peer = (scope.get("state") or {}).get("meshlib.peer")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = f"{peer.identity if peer else 'nobody'} {scope['scheme']}".encode()
        await send({"type": "http.response.body", "body": body})

def wsgi(environ, start_response):
    peer = environ.get("meshlib.peer")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{peer.identity if peer else 'nobody'} {environ['wsgi.url_scheme']}".encode()]
"""
FLASK = """
import flask

app = flask.Flask(__name__)

@app.get("/", defaults={"path": ""})
@app.get("/<path:path>")
def page(path):
    peer = flask.request.environ.get("meshlib.peer")
    return f"{peer.identity if peer else 'nobody'} {flask.request.scheme}"
"""
WRAPPED = """
import sys
import meshlib, plain

mesh = meshlib.connect()
asgi, wsgi = mesh.asgi(plain.asgi), mesh.wsgi(plain.wsgi)

if __name__ == "__main__" and sys.argv[1] == "hypercorn":
    import asyncio
    from hypercorn.config import Config
    from meshlib.inbound.hypercorn import serve

    config = Config()
    config.bind = [f"127.0.0.1:{sys.argv[2]}"]
    asyncio.run(serve(asgi, config))
elif __name__ == "__main__":
    import flasks
    from meshlib.inbound.werkzeug import RequestHandler

    flasks.app.wsgi_app = mesh.wsgi(flasks.app.wsgi_app)
    flasks.app.run("127.0.0.1", int(sys.argv[2]), request_handler=RequestHandler)
"""
HEAD = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
ON_THE_MESH = [sys.executable, "-m", "meshlib.cli", "run", "--"]
PYTHON = [sys.executable, "-m"]
GUNICORN = [*PYTHON, "gunicorn", "--no-control-socket", "-b", "127.0.0.1:PORT"]
UVICORN = [*PYTHON, "uvicorn", "--port", "PORT"]
COMMANDS = {
    "uvicorn": [*UVICORN, "--http", "meshlib.inbound.serve:uvicorn_protocol", "wrapped:asgi"],
    "uvicorn, run": [*ON_THE_MESH, *UVICORN, "plain:asgi"],
    "hypercorn": [sys.executable, "wrapped.py", "hypercorn", "PORT"],
    "hypercorn, run": [*ON_THE_MESH, *PYTHON, "hypercorn", "-b", "127.0.0.1:PORT", "plain:asgi"],
    "gunicorn sync": [*GUNICORN, "-k", "meshlib.inbound.gunicorn.Sync", "wrapped:wsgi"],
    "gunicorn sync, run": [*ON_THE_MESH, *GUNICORN, "plain:wsgi"],
    "gunicorn threads": [*GUNICORN, "-k", "meshlib.inbound.gunicorn.Threads", "--threads", "4", "wrapped:wsgi"],
    "gunicorn threads, run": [*ON_THE_MESH, *GUNICORN, "--threads", "4", "plain:wsgi"],
    "gunicorn uvicorn": [*GUNICORN, "-k", "meshlib.inbound.gunicorn_uvicorn.Uvicorn", "wrapped:asgi"],
    "gunicorn uvicorn, run": [*ON_THE_MESH, *GUNICORN, "-k", "uvicorn.workers.UvicornWorker", "plain:asgi"],
    "gunicorn asgi": [*GUNICORN, "-k", "meshlib.inbound.gunicorn_asgi.Asgi", "wrapped:asgi"],
    "gunicorn asgi, run": [*ON_THE_MESH, *GUNICORN, "-k", "asgi", "plain:asgi"],
    "flask": [sys.executable, "wrapped.py", "flask", "PORT"],
    "flask run": [*ON_THE_MESH, *PYTHON, "flask", "--app", "flasks", "run", "-p", "PORT"],
}
KINDS = pytest.mark.parametrize("kind", COMMANDS)


def label(kind: str) -> str:
    return kind.replace(",", "").replace(" ", "-")


class Town:
    """All servers at once, of one identity, in a mesh that is one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, TestCA()
        self.ports = dict.fromkeys(COMMANDS, 0)
        self.caller = self.authority.credentials("ratings")
        self._mode = ""
        for name in ("identity", "mesh"):
            (folder / name).mkdir()
        for name, text in (("plain", PLAIN), ("flasks", FLASK), ("wrapped", WRAPPED)):
            (folder / f"{name}.py").write_text(text)
        self.renew()
        self.mode("STRICT")
        self._processes = [self._start(kind) for kind in COMMANDS]

    def _start(self, kind: str) -> subprocess.Popen[bytes]:
        port = self.ports[kind] = unused_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHLIB_")}
        environment |= {
            "MESHLIB_CONTROL_PLANE": str(self.folder / "mesh"),
            "MESHLIB_IDENTITY": f"files:{self.folder / 'identity'}",
            "MESHLIB_LABELS": f"server={label(kind)}",
        }
        if kind.endswith("run"):
            environment["MESHLIB_PROBE_PATHS"] = "/healthz"
        command = [word.replace("PORT", str(port)) for word in COMMANDS[kind]]
        with self.log(kind).open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def log(self, kind: str) -> Path:
        return self.folder / f"{kind}.log"

    def renew(self) -> Credentials:
        """As cert-manager does it, one file after the other."""
        self.server = self.authority.credentials("reviews")
        for name, content in files_of(self.server).items():
            written = self.folder / "identity" / f".{name}"
            written.write_bytes(content)
            written.replace(self.folder / "identity" / name)
        return self.server

    def mode(self, mode: str, by_port: str = "") -> None:
        """PeerAuthentication's, of all of them; by_port: of each one's own port."""
        if (wanted := f"{mode} {by_port}") == self._mode:
            return
        self._mode = wanted
        text = f"{HEAD}metadata: {{name: default}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        if by_port:  # as in Istio, ports are for a workload that is selected
            text = "---\n".join(
                f"{HEAD}metadata: {{name: on-{port}}}\nspec:\n  selector: {{matchLabels: {{server: {label(kind)}}}}}\n"
                f"  mtls: {{mode: {mode}}}\n  portLevelMtls: {{{port}: {{mode: {by_port}}}}}\n"
                for kind, port in self.ports.items()
            )
        written = self.folder / ".mesh.yaml"
        written.write_text(text)
        written.replace(self.folder / "mesh" / "mesh.yaml")

    def client(self, credentials: Credentials | None = None) -> httpx.Client:
        rules = UpstreamTls("ISTIO_MUTUAL", subject_alt_names=(self.server.identity.uri,))
        shown = credentials or self.caller
        return httpx.Client(
            verify=TlsContexts(lambda: shown, has_identity=True).client(rules), trust_env=False, timeout=20
        )

    def ask(self, kind: str, scheme: str, path: str = "/") -> str:
        """The body, the status where it is none, or `refused`: by a connection of its own."""
        with self.client() as client:
            try:
                answer = client.get(f"{scheme}://127.0.0.1:{self.ports[kind]}{path}")
            except (httpx.TransportError, ssl.SSLError):
                return "refused"
            return answer.text if answer.status_code == 200 else str(answer.status_code)

    def until(self, kind: str, wanted: object, look: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while (seen := look()) != wanted:
            assert time.monotonic() < deadline, f"{kind}: {seen}, not {wanted}\n{self.log(kind).read_text()}"
            time.sleep(0.05)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    town = Town(tmp_path_factory.mktemp("town"))
    try:
        for kind in COMMANDS:
            town.until(kind, SECURED, lambda kind=kind: town.ask(kind, "https"))  # type: ignore[misc]
        yield town
    finally:
        town.close()


SECURED = "spiffe://cluster.local/ns/default/sa/ratings http"
REFUSED = {False: "refused", True: "403"}
"""In plaintext, where the port is STRICT: by whether probes are let through, so that the path must be read first."""


def is_probed(kind: str) -> bool:
    return kind.endswith("run")


@KINDS
def test_strict(kind: str, town: Town) -> None:
    """The application hears who calls, over a connection that is kept; plaintext and strangers get nothing."""
    town.mode("STRICT")
    town.until(kind, SECURED, lambda: town.ask(kind, "https"))
    assert town.ask(kind, "http") == REFUSED[is_probed(kind)], town.log(kind).read_text()
    if is_probed(kind):
        asked = [town.ask(kind, "http", path) for path in ("/healthz?x=1", "/healthz/", "/healthz/..", "/Healthz")]
        assert asked == ["None http" if "uvicorn" in kind else asked[0], "403", "403", "403"]
        assert asked[0] != "403"
    with town.client(TestCA().credentials("ratings")) as stranger, pytest.raises(httpx.TransportError):
        stranger.get(f"https://127.0.0.1:{town.ports[kind]}/")


@KINDS
def test_a_renewed_certificate_is_shown_and_drops_no_connection(kind: str, town: Town) -> None:
    """To who comes next; who is there goes on, where the server keeps connections at all."""
    town.mode("STRICT")
    url = f"https://127.0.0.1:{town.ports[kind]}/"
    town.until(kind, SECURED, lambda: town.ask(kind, "https"))
    with town.client() as kept:
        assert kept.get(url).status_code == 200
        shown = ssl.PEM_cert_to_DER_cert(town.renew().certificate_chain.decode())
        town.until(kind, shown, lambda: certificate(town, kind))
        assert kept.get(url).text == SECURED


def certificate(town: Town, kind: str) -> bytes | None:
    """What a new connection is shown."""
    context = TlsContexts(lambda: town.caller, has_identity=True).client(UpstreamTls("ISTIO_MUTUAL"))
    with (
        socket.create_connection(("127.0.0.1", town.ports[kind]), 20) as plain,
        context.wrap_socket(plain, server_hostname="reviews") as secured,
    ):
        return secured.getpeercert(binary_form=True)


@KINDS
def test_permissive(kind: str, town: Town) -> None:
    """Both on one port, told apart by the first byte; nobody is identified in plaintext."""
    town.mode("PERMISSIVE")
    town.until(kind, "None http", lambda: town.ask(kind, "http"))
    assert town.ask(kind, "https") == SECURED


@KINDS
def test_a_port_has_its_own_mode(kind: str, town: Town) -> None:
    """STRICT, of a workload that is PERMISSIVE."""
    town.mode("PERMISSIVE", "STRICT")
    town.until(kind, REFUSED[is_probed(kind)], lambda: town.ask(kind, "http"))
    assert town.ask(kind, "https") == SECURED


@KINDS
def test_disable(kind: str, town: Town) -> None:
    """Plaintext, and TLS is what the server makes of it: nothing."""
    town.mode("DISABLE")
    town.until(kind, "refused", lambda: town.ask(kind, "https"))
    assert town.ask(kind, "http") == "None http"
