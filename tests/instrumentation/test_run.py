"""Claims about `meshctl run`: applications that know no mesh are on it, in real processes of their usual servers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from instrumentation.world import WORLD
from outbound.grpc_peers import GrpcPeer
from peers import Answer, Peer, Received, unused_port

pytestmark = pytest.mark.processes

RUN = [sys.executable, "-m", "meshlib.cli", "run"]
FLASK = """
import flask, requests
app = flask.Flask(__name__)
session = requests.Session()

@app.get("/")
def page():
    return session.get("http://reviews:9080/flask").text
"""
STARLETTE = """
import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def page(request):
    async with httpx.AsyncClient() as client:
        return PlainTextResponse((await client.get("http://reviews:9080/starlette")).text)

app = Starlette(routes=[Route("/", page)])
"""
CLIENTS = """
import aiohttp, asyncio, httpx, httpx2, requests, urllib3

URL = "http://reviews:9080/"

async def by_aiohttp():
    async with aiohttp.ClientSession() as session, session.get(URL) as response:
        return await response.text()

print(httpx.get(URL).text)
print(httpx2.get(URL).text)
print(requests.get(URL).text)
print(urllib3.request("GET", URL).data.decode())
print(asyncio.run(by_aiohttp()))
"""
GRPC = """
import asyncio, grpc, grpc.aio, os, sys
from concurrent.futures import ThreadPoolExecutor

METHOD = "/test.Echo/UnaryUnary"
PORT = sys.argv[1]

def tell(request, context):
    return dict(context.invocation_metadata()).get("x-request-id", "").encode()

handlers = {"UnaryUnary": grpc.unary_unary_rpc_method_handler(tell)}
server = grpc.server(ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()

async def by_asyncio():
    async with grpc.aio.insecure_channel("reviews:9080") as channel:
        return await channel.unary_unary(METHOD)(b"aio", timeout=30)

with grpc.insecure_channel("reviews:9080") as channel:
    print(channel.unary_unary(METHOD)(b"sync", timeout=30).decode())
print(asyncio.run(by_asyncio()).decode())
with grpc.insecure_channel(f"dns:///127.0.0.1:{PORT}") as channel:
    print(channel.unary_unary(METHOD)(b"outside", timeout=30).decode())
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:  # the server above, behind interceptors
    print(len(channel.unary_unary(METHOD)(b"", timeout=30)))
with grpc.insecure_channel("reviews:9080", options=[("meshlib.mesh", 0)]) as channel:
    try:
        channel.unary_unary(METHOD)(b"bare", timeout=30)
    except grpc.RpcError as error:
        print(error.code().name)
server.stop(0).wait(10)
"""
PROCESSES = """
import os, subprocess, sys, httpx

code = "import urllib3; print(urllib3.request('GET', 'http://reviews:9080/').data.decode())"
subprocess.run([sys.executable, "-c", code], check=True)
with httpx.Client() as client:
    child = os.fork()
    if child == 0:
        print(client.get("http://reviews:9080/").text, flush=True)
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def answer(received: Received) -> Answer:
    return Answer(body=b"by the mesh")


@pytest.fixture
def reviews() -> Iterator[Peer]:
    with Peer(answer) as peer:
        yield peer


@pytest.fixture
def environment(tmp_path: Path, reviews: Peer) -> dict[str, str]:
    """Of a process in the mesh, in which `reviews` is a name that only the mesh knows."""
    world = tmp_path / "mesh"
    world.mkdir()
    (world / "world.yaml").write_text(WORLD.format(port=reviews.port))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MESHLIB_")}
    return {**inherited, "MESHLIB_CONTROL_PLANE": str(world), "PYTHONWARNINGS": "error::ResourceWarning"}


@contextmanager
def served(command: list[str], port: int, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """Runs a server until it accepts connections; it ends by SIGTERM, with what it says to that as exit code 0."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*RUN, "--", *command], env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)  # no event tells that another process listens
        yield
    finally:
        process.terminate()
        process.wait(30)


def server(kind: str, port: int) -> list[str]:
    python = [sys.executable, "-m"]
    return {
        "gunicorn": [*python, "gunicorn", "-b", f"127.0.0.1:{port}", "--threads", "2", "flasks:app"],
        "gunicorn --preload": [*python, "gunicorn", "-b", f"127.0.0.1:{port}", "--preload", "-w", "2", "flasks:app"],
        "flask run": [*python, "flask", "--app", "flasks", "run", "-p", str(port)],
        "uvicorn --workers": [*python, "uvicorn", "--port", str(port), "--workers", "2", "starlettes:app"],
    }[kind]


@pytest.mark.parametrize("kind", ["gunicorn", "gunicorn --preload", "flask run", "uvicorn --workers"])
def test_an_application_is_served_and_calls_on_the_mesh(
    kind: str, tmp_path: Path, environment: dict[str, str], reviews: Peer
) -> None:
    """Its call arrives at an endpoint that only the mesh knows, with the id of the request that it was made for."""
    (tmp_path / "flasks.py").write_text(FLASK)
    (tmp_path / "starlettes.py").write_text(STARLETTE)
    port = unused_port()
    with served(server(kind, port), port, environment, tmp_path):
        got = httpx.get(f"http://127.0.0.1:{port}/", headers={"x-request-id": "from-outside"}, timeout=30)
        assert got.text == "by the mesh", (tmp_path / "log").read_text()
    assert [each.header("x-request-id") for each in reviews.received] == ["from-outside"]


@pytest.mark.parametrize(("script", "calls"), [(CLIENTS, 5), (PROCESSES, 2)], ids=["clients", "processes"])
def test_a_plain_script_calls_on_the_mesh(script: str, calls: int, tmp_path: Path, environment: dict[str, str]) -> None:
    """By each client; in a process that it starts, and in one that it forks."""
    (tmp_path / "script.py").write_text(script)
    result = subprocess.run(
        [*RUN, sys.executable, "script.py"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "by the mesh\n" * calls, "")


@pytest.mark.parametrize("excluded", ["", "grpc"])
def test_grpc_is_on_the_mesh_unless_it_is_excluded(excluded: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """Channels, sync and of asyncio, to a name that only the mesh knows and to an address that it does not; a server,
    which gives calls a request id; and a channel that opts out by itself."""
    (tmp_path / "script.py").write_text(GRPC)
    with GrpcPeer() as peer:
        (tmp_path / "mesh" / "world.yaml").write_text(WORLD.format(port=peer.port))
        result = subprocess.run(
            [*RUN, "--exclude", excluded, "--", sys.executable, "script.py", str(peer.port)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    if excluded:
        assert result.returncode == 1 and "reviews" in result.stderr
    else:
        told = ["peer:sync", "peer:aio", "peer:outside", "36", "UNAVAILABLE"]
        assert (result.returncode, result.stdout.split()) == (0, told), result.stderr


def test_an_own_sitecustomize_still_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    """The one that stands on PYTHONPATH behind ours; and a module is run by -m."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import builtins; builtins.OWN = 'mine'")
    (own / "program.py").write_text("import sys, sitecustomize; print(OWN, sitecustomize.__file__, sys.argv[1:])")
    environment["PYTHONPATH"] = str(own)
    result = subprocess.run(
        [*RUN, "-m", "program", "--flag"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.stderr) == (f"mine {own / 'sitecustomize.py'} ['--flag']\n", "")


@pytest.mark.parametrize(
    ("arguments", "control_plane", "told"),
    [
        (["true"], "", "no control plane: set MESHLIB_CONTROL_PLANE"),
        (
            ["--exclude", "flask", "--", "true"],
            "cp.example:15010",
            "'flask' can't be excluded; there are aiohttp,",
        ),
        (["no-such-command-of-ours"], "cp.example:15010", "no-such-command-of-ours: there is no such command"),
    ],
)
def test_what_cannot_be_run_is_said(arguments: list[str], control_plane: str, told: str) -> None:
    """Before anything is started, in one sentence."""
    environment = {**os.environ, "MESHLIB_CONTROL_PLANE": control_plane}
    result = subprocess.run([*RUN, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {told}")
