"""gunicorn's workers are one service: one port tells what all of them have counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from peers import unused_port

APPLICATION = """
import os
import meshlib

mesh = meshlib.connect(telemetry="off")

def app(environ, start_response):
    body = str(os.getpid()).encode()
    start_response("200 OK", [("content-length", str(len(body)))])
    return [body]

app = mesh.wsgi(app)
mesh.start()
"""


def _counted(port: int) -> float:
    try:
        text = httpx.get(f"http://127.0.0.1:{port}/stats/prometheus", trust_env=False, timeout=20).text
    except httpx.TransportError:
        return -1.0
    families = {each.name: each for each in text_string_to_metric_families(text)}
    return sum(each.value for each in families["istio_requests"].samples) if "istio_requests" in families else 0.0


def _eventually(port: int, wanted: float) -> None:
    started = time.monotonic()
    while (found := _counted(port)) != wanted:
        assert time.monotonic() - started < 30, f"{found} requests are told, not {wanted}"
        time.sleep(0.1)


@pytest.mark.processes
@pytest.mark.parametrize("preload", [False, True])
def test_four_workers_are_scraped_as_one(tmp_path: Path, preload: bool) -> None:
    """The sum is what was sent, whichever worker served it; also after the worker that held the port was killed."""
    (tmp_path / "counted_app.py").write_text(APPLICATION)
    port, scraped = unused_port(), unused_port()
    command = [sys.executable, "-m", "gunicorn", "-w", "4", "-b", f"127.0.0.1:{port}", "counted_app:app"]
    process = subprocess.Popen(
        [*command, *(["--preload"] if preload else [])],
        cwd=tmp_path,
        env={**os.environ, "MESHLIB_PROMETHEUS": f"127.0.0.1:{scraped}", "TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        workers: set[int] = set()
        sent, started = 0, time.monotonic()
        while len(workers) < 4:
            assert time.monotonic() - started < 60, f"only {len(workers)} workers have answered"
            try:
                workers.add(int(httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=20).text))
                sent += 1
            except httpx.TransportError:
                time.sleep(0.1)
        _eventually(scraped, sent)
        os.kill(min(workers), signal.SIGKILL)
        for _ in range(20):
            try:
                httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=20)
                sent += 1
            except httpx.TransportError:  # its connection was in the killed worker's hands
                pass
        _eventually(scraped, sent)
    finally:
        process.terminate()
        process.wait(30)
