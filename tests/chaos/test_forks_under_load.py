"""What happens to calls while their process forks? os.fork, multiprocessing, and gunicorn with preload."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from chaos.fork_scene import STRIDE
from chaos.ledgers import Ledgers, configuration
from chaos.recording import IS_FULL, Promising
from e2e.town import answers, eventually
from peers import unused_port

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]

CHILDREN, CALLS = (60, 50) if IS_FULL else (6, 10)
RELOADS = 8 if IS_FULL else 1
APPLICATION = """
import itertools, os, threading
import meshlib

mesh = meshlib.connect({config!r})
client = mesh.Client(timeout=60)
numbers = itertools.count({begin})

def beat():
    # A thread of the master's that calls while workers are forked off, as an application that warms up may have.
    while True:
        client.get("http://ledger.example.com/", headers={{"x-call": str(next(numbers))}})

threading.Thread(target=beat, daemon=True).start()

def application(environ, start_response):
    number = environ["QUERY_STRING"]
    answer = client.post("http://ledger.example.com/", headers={{"x-call": number}})
    start_response("200 OK" if answer.text == number + " " else "500 Mixed up", [("content-type", "text/plain")])
    return [str(os.getpid()).encode()]

app = mesh.wsgi(application)
"""


async def test_a_fork_mixes_up_no_answers_and_repeats_nothing(tmp_path: Path, promise: Promising) -> None:
    """A child has its parent's client, and with it copies of connections on which the parent's answers come."""
    async with promise(
        "A process may fork while its threads call: children call with the parent's client over connections of their "
        "own, no answer goes to another call, none hangs on a lock that a thread held, nothing is carried out twice",
        f"{CHILDREN} children by os.fork and multiprocessing, {CALLS} POST each, four threads of the parent calling",
    ) as told:
        with Ledgers(tmp_path / "servers", 2) as servers:
            config = tmp_path / "config"
            config.mkdir()
            (config / "mesh.yaml").write_text(configuration(servers.ports, per_try=20.0))
            scene = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "ignore::DeprecationWarning"),  # Python 3.12 warns of forks beside threads
                *(str(Path(__file__).with_name("fork_scene.py")), str(config), str(CHILDREN), str(CALLS)),
                env={**os.environ, "MESHLIB_CACHE_DIR": "-"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            said, errors = await scene.communicate()
            executed = servers.executed()
        assert scene.returncode == 0, errors.decode()
        found = json.loads(said)
        assert found["failures"] == []
        assert found["codes"] == [0] * CHILDREN, errors.decode()
        posts = {number: times for (method, number), times in executed.items() if method == "POST"}
        wanted = {child * STRIDE + each for child in range(1, CHILDREN + 1) for each in range(1, CALLS + 1)}
        assert wanted <= posts.keys()
        assert [number for number, times in posts.items() if times != 1] == []
        told.counted("calls of the children", CHILDREN * CALLS)
        told.counted("calls of the parent meanwhile", found["parent"])
        told.counted("lost, carried out twice, or answered with another's answer", 0)


def test_gunicorn_with_preload_replaces_its_workers_without_a_lost_call(tmp_path: Path, promise: Promising) -> None:
    """The master has called before, and does so while it forks."""
    with promise(
        "gunicorn --preload with a mesh made before the fork: workers are replaced under load without a failed "
        "request, and each of their calls is carried out once",
        f"two workers replaced {RELOADS} times by SIGHUP while the master calls and requests come in",
    ) as told:
        with Ledgers(tmp_path / "servers", 2) as servers:
            config, port = tmp_path / "config", unused_port()
            config.mkdir()
            (config / "mesh.yaml").write_text(configuration(servers.ports, per_try=20.0))
            (tmp_path / "preloaded.py").write_text(APPLICATION.format(config=str(config), begin=10 * STRIDE))
            log = (tmp_path / "log").open("wb")
            server = subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore::DeprecationWarning", "-m", "gunicorn", "--preload", "-w", "2"),
                    *("-b", f"127.0.0.1:{port}", "--pythonpath", str(tmp_path), "preloaded:app"),
                ],
                stdout=log,
                stderr=log,
            )
            log.close()
            try:
                workers, asked, failures = _ask_while_reloaded(f"http://127.0.0.1:{port}", server)
            finally:
                server.terminate()
                server.wait(60)
            executed = servers.executed()
        assert failures == [], (tmp_path / "log").read_text()[-4000:]
        assert {executed["POST", number] for number in range(1, asked + 1)} == {1}
        assert len(workers) > 2
        told.counted("requests", asked)
        told.counted("requests that failed", 0)
        told.counted("workers that answered", len(workers))


def _ask_while_reloaded(url: str, server: subprocess.Popen[bytes]) -> tuple[set[str], int, list[str]]:
    """Which processes answered, how many requests were made, and what failed."""
    eventually(lambda: server.poll() is None and answers(f"{url}/?0"), "gunicorn answers")
    workers, failures, over = set[str](), list[str](), threading.Event()
    asked = 0

    def ask() -> None:
        nonlocal asked
        while not over.is_set():
            asked += 1
            answer = httpx.get(f"{url}/?{asked}", trust_env=False, timeout=60)
            workers.add(answer.text)
            if answer.status_code != 200:
                failures.append(f"{asked} {answer.status_code} {answer.text}")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(RELOADS):
            eventually(lambda: bool(workers), "a worker answers")
            known = set(workers)
            server.send_signal(signal.SIGHUP)
            eventually(lambda known=known: not workers <= known, "a new worker answers")  # type: ignore[misc]
            time.sleep(0.5)
    finally:
        over.set()
        thread.join(60)
    return workers, asked, failures
