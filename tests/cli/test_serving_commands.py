"""Do `meshctl control-plane` and `meshctl gateway` behave as processes should? Signals, ports, what they print."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

MESHCTL = (sys.executable, "-m", "meshlib.cli")
FREE = ("--xds", "127.0.0.1:0", "--admin", "127.0.0.1:0")
CONFIG = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: door}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: ["*"]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: hello}
spec:
  hosts: ["*"]
  gateways: [door]
  http:
  - directResponse: {status: 200, body: {string: hello}}
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own: what runs on the developer's machine is not found, nor disturbed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MESHLIB_", "MESHCTL_"))}
    return {**environment, "XDG_STATE_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*MESHCTL, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def addresses(process: subprocess.Popen[str]) -> tuple[str, str]:
    """xDS's and the admin API's, once it serves them."""
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words[:2] == ["serving", "xDS"], process.communicate()
    return words[3].rstrip(","), words[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_control_plane_serves_until_a_signal_and_ends_cleanly(
    start: Start, environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """It announces itself, so that meshctl finds it at ports that are not the usual ones, and withdraws that."""
    (tmp_path / "door.yaml").write_text(CONFIG)
    process = start("control-plane", str(tmp_path / "door.yaml"), *FREE)
    xds, admin = addresses(process)
    announced = tmp_path / "home" / "meshlib" / "control-plane.json"
    assert json.loads(announced.read_text()) == {"admin": admin, "xds": xds, "pid": process.pid}
    found = subprocess.run([*MESHCTL, "get", "gw"], env=environment, capture_output=True, text=True, timeout=30)
    assert "door" in found.stdout
    process.send_signal(number)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    assert not announced.exists()


def test_a_control_plane_that_can_not_serve_says_why_and_ends(start: Start, tmp_path: Path) -> None:
    """A taken port, a missing folder, an address that is none, a state folder in use."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for words, told in (
            (("--xds", address, "--admin", "127.0.0.1:0"), f"error: xDS can't be served on {address}"),
            (("--xds", "127.0.0.1:0", "--admin", address), f"error: the admin API can't be served on {address}"),
            (("nowhere/", *FREE), "error: the path 'nowhere' does not exist"),
            (("--xds", "15010"), "error: --xds '15010': an address is HOST:PORT"),
            (("--log-level", "loud"), "error: --log-level 'loud'"),
        ):
            process = start("control-plane", *words)
            _, err = process.communicate(timeout=20)
            assert process.returncode == 1
            assert told in err
            assert "Traceback" not in err
    first = start("control-plane", "--state", str(tmp_path / "state"), *FREE)
    addresses(first)
    second = start("control-plane", "--state", str(tmp_path / "state"), *FREE)
    _, err = second.communicate(timeout=20)
    assert (second.returncode, "is in use by another control plane" in err) == (1, True)


def test_the_gateway_finds_the_control_plane_and_serves_on_the_port_it_was_given(start: Start, tmp_path: Path) -> None:
    """--port 8080=N: where a Gateway says 8080, listen on N. Until a signal."""
    (tmp_path / "door.yaml").write_text(CONFIG)
    addresses(start("control-plane", str(tmp_path), *FREE))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    gateway = start("gateway", "--port", f"8080={port}")
    deadline = time.monotonic() + 20
    while True:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline, gateway.communicate()
            time.sleep(0.05)
    assert (answer.status_code, answer.text) == (200, "hello")
    gateway.send_signal(signal.SIGTERM)
    _, err = gateway.communicate(timeout=15)
    assert gateway.returncode == 0, err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["8080", "8080=", "=8080", "0=1", "8080=70000", "http=8080"])
def test_a_port_that_is_none_is_refused(start: Start, option: str) -> None:
    """Before anything is started."""
    process = start("gateway", "--port", option)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (1, f"error: --port {option!r}: write PORT=LOCAL, as 443=8443\n")
