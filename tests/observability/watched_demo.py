"""The Bookinfo demo with traffic that is known, scraped by a real Prometheus, for those who read one or the other."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import httpx

from e2e.test_demo import Demo
from telemetry.test_real_prometheus import Prometheus, prometheus_of

BUILT = Path(__file__).parents[2] / ".venv" / "go" / "bin"
PATIENCE = 120.0
DENIED = "/api/v1/products/1"
"""Of the paths that are asked for, the one that `details` refuses."""
RULES = """apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-this-book, namespace: default}
spec:
  selector: {matchLabels: {app: details}}
  action: DENY
  rules: [{to: [{operation: {paths: ["/details/1"]}}]}]
"""
PROMETHEUS_YML = """global: {{scrape_interval: 3s}}
scrape_configs:
- job_name: meshlib-control-plane
  static_configs: [{{targets: ["{admin}"]}}]
- job_name: meshlib
  honor_labels: true
  http_sd_configs: [{{url: "http://{admin}/sd/prometheus", refresh_interval: 1s}}]
"""


class Visitors:
    """Three pages, then one book that is refused, and so on, at an even pace, until the block is over."""

    def __init__(self, page: str, per_second: float) -> None:
        self._page, self._pause = page, 1.0 / per_second
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._visit, daemon=True)
        self.answers: Counter[int] = Counter()

    def _visit(self) -> None:
        with httpx.Client(base_url=self._page.removesuffix("/productpage"), trust_env=False, timeout=30) as http:
            number, due = 0, time.monotonic()
            while not self._is_over.wait(max(0.0, due - time.monotonic())):
                number, due = number + 1, due + self._pause
                self.answers[http.get(DENIED if number % 4 == 0 else "/productpage").status_code] += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)


@contextmanager
def demo_process(folder: Path, **environment: str) -> Iterator[Demo]:
    """With the rule that makes `details` refuse one book."""
    demo = Demo(folder, "--port", "0", **environment)
    try:
        assert demo.page
        (folder / "rules.yaml").write_text(RULES)
        applied = demo.meshctl("apply", "-f", str(folder / "rules.yaml"))
        assert applied.returncode == 0, applied.stdout + applied.stderr
        with httpx.Client(base_url=demo.page.removesuffix("/productpage"), trust_env=False, timeout=30) as http:
            eventually(lambda: http.get(DENIED).status_code == 403, lambda: "details still lets everybody in")
        yield demo
    finally:
        demo.stop()


@contextmanager
def scraped(folder: Path, demo: Demo) -> Iterator[Prometheus]:
    """All of the demo's processes are found by asking the control plane."""
    (folder / "prometheus.yml").write_text(PROMETHEUS_YML.format(admin=demo.admin.removeprefix("http://")))
    with prometheus_of(folder) as asked:
        # Gateway and seven services.
        asked.until('count(istio_build{component="proxy"})', 8)
        yield asked


def eventually(holds: Callable[[], bool], what: Callable[[], str], patience: float = PATIENCE) -> None:
    """Of another process' state, which can only be asked for. what: is said where it does not hold."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@contextmanager
def program(folder: Path, name: str, *words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that Go has built. Its output is in `folder`/NAME.log."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(BUILT / name), *words], stdout=log, stderr=log, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def log_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text(errors="replace")[-4000:]
