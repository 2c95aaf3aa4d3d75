"""Bookinfo in processes of its own, with a control plane, for tests that kill things.

Unlike the demo nobody starts again what dies here: the test does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

import meshlib
from joining import join_token
from meshlib.controlplane.server import ControlPlane
from meshlib.mesh import Mesh
from meshlib.model import SpiffeId
from peers import unused_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "bookinfo"
PATIENCE = 60.0


def eventually(what: Callable[[], bool], told: str, patience: float = PATIENCE) -> float:
    """Waits for another process' state, which can only be asked for. Returns the seconds it took."""
    started = time.monotonic()
    while not what():
        if time.monotonic() - started > patience:
            raise AssertionError(f"not within {patience:g} s: {told}")
        time.sleep(0.01)
    return time.monotonic() - started


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Town:
    """A control plane over `config` (a folder of YAML), and whatever services a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config"
        self.config.mkdir(parents=True)
        self.xds, self.admin = unused_port(), unused_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.xds}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin}"

    def start_control_plane(self, is_awaited: bool = True) -> None:
        self.start(
            "control-plane",
            [
                *(sys.executable, "-m", "meshlib.cli", "control-plane", str(self.config)),
                *("--state", str(self.folder / "state"), "--xds", self.target, "--admin", f"127.0.0.1:{self.admin}"),
            ],
            {},
        )
        if is_awaited:
            self.await_control_plane()

    def await_control_plane(self) -> None:
        eventually(lambda: answers(f"{self.admin_url}/readyz"), "the control plane is ready")

    def start_service(self, service: str, version: str, name: str = "", **environment: str) -> str:
        """Returns its name once it is registered as an endpoint."""
        name = name or f"{service}-{version}"
        port = self.ports[name] = self.ports.get(name) or unused_port()
        self.start(
            name,
            [sys.executable, f"{service}.py", str(port)],
            {
                "MESHLIB_CONTROL_PLANE": self.target,
                "MESHLIB_SERVICE": service,
                "MESHLIB_LABELS": f"app={service},version={version}",
                "MESHLIB_WORKLOAD": f"{service}-{version}",
                "MESHLIB_ADDRESS": f"127.0.0.1:{port}",
                "MESHLIB_FORWARD_HEADERS": "end-user",
                "MESHLIB_CACHE_DIR": str(self.folder / "cache" / name),
                "SERVICE_VERSION": version,
                "HOSTNAME": name,
                "HOST": "127.0.0.1",
                **environment,
            },
            EXAMPLES / "services",
        )
        return name

    def start_reviews(self, version: str, name: str = "") -> str:
        extra = {"v1": {}, "v2": {"ENABLE_RATINGS": "true"}, "v3": {"ENABLE_RATINGS": "true", "STAR_COLOR": "red"}}
        return self.start_service("reviews", version, name, **extra[version])

    def await_registered(self, *names: str) -> None:
        wanted = {f"127.0.0.1:{self.ports[name]}" for name in names}
        eventually(lambda: wanted <= self.registered(), f"{names} are registered")

    def registered(self) -> set[str]:
        try:
            found = httpx.get(f"{self.admin_url}/v1/endpoints", trust_env=False, timeout=20).json()
        except httpx.HTTPError:
            return set()
        return {each["address"] for service in found["services"] for each in service.get("endpoints", [])}

    def start(self, name: str, command: list[str], environment: Mapping[str, str], cwd: Path = ROOT) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=cwd, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, stdout=log, stderr=log
            )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(20)

    def configure(self, *files: str) -> None:
        """Copies files of examples/bookinfo into the watched folder."""
        for file in files:
            shutil.copy(EXAMPLES / file, self.config / Path(file).name)

    def write(self, name: str, text: str) -> None:
        """As an editor saves: a new file in the old one's place."""
        draft = self.config / f".{name}.tmp"
        draft.write_text(text)
        draft.replace(self.config / name)

    def meshctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "meshlib.cli", *arguments, "--control-plane", self.admin_url],
            capture_output=True,
            text=True,
            cwd=EXAMPLES / "networking",
            timeout=30,
        )

    def mesh(self, name: str = "tester") -> Mesh:
        """A caller in this very process."""
        return meshlib.connect(self.target, workload=name, cache_dir=str(self.folder / "cache" / name))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.processes[name].send_signal(signal.SIGTERM)
        for name in list(self.processes):
            process = self.processes.pop(name)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Load:
    """Threads that call, with so many seconds between, until the block ends. failures: everything that was not a 200.

    cut: those of which the head had come, and the body did not: what has begun to be answered can't be tried again.
    """

    def __init__(self, client: httpx.Client, url: str, threads: int, pause: float = 0.0) -> None:
        self.pause = pause
        self.calls, self.failures, self.cut = 0, list[str](), list[str]()
        self._client, self._url = client, url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def _work(self) -> None:
        while not self._stop.is_set():
            has_begun = False
            try:
                with self._client.stream("GET", self._url) as response:
                    has_begun = True
                    response.read()
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                if has_begun:
                    self.cut.append(repr(error))
            else:
                if response.status_code != 200:
                    self.failures.append(f"{response.status_code} {response.text} {response.extensions}")
            self.calls += 1
            self._stop.wait(self.pause)

    def some_more(self, calls: int = 100) -> None:
        """Waits until so many more calls were made."""
        target = self.calls + calls
        eventually(lambda: self.calls >= target, "the load goes on")

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


@contextmanager
def load(client: httpx.Client, url: str, threads: int = 4, pause: float = 0.0) -> Iterator[Load]:
    with Load(client, url, threads, pause) as running:
        yield running


def member(plane: ControlPlane, folder: Path, name: str, **settings: Any) -> Mesh:
    """A process with nothing but a join token for its service account."""
    give_token(plane, folder, name)
    return meshlib.connect(
        plane.xds_address,
        workload=name,
        service_account=name,
        cache_dir="-",
        identity="control-plane",
        token_file=str(folder / name),
        **settings,
    )


def give_token(plane: ControlPlane, folder: Path, name: str) -> None:
    """A join token, which is good for one join."""
    token = join_token(plane, SpiffeId.of("cluster.local", "default", name))
    (folder / name).write_text(token)
