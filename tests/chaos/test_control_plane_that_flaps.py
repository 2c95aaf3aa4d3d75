"""What do calls notice of a control plane that dies again and again, while its configuration is edited?"""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

import meshlib
from chaos.echoes import SERVICE, start_echo
from chaos.recording import IS_FULL, Promise, Promising
from e2e.town import Town, eventually, load
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

FLAPS = 30 if IS_FULL else 1
ROUTE = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: echo}}
spec:
  hosts: [echo]
  http:
  - headers: {{response: {{set: {{x-edit: "{edit}"}}}}}}
    route: [{{destination: {{host: echo}}}}]
"""


def test_a_control_plane_that_flaps_fails_no_call_and_is_believed_in_the_end(
    tmp_path: Path, promise: Promising
) -> None:
    """Endpoints are registered with it, and with nobody else."""
    with promise(
        "A control plane that is killed and started again and again fails no call and loses no endpoint; the last "
        "edit is in force once it stays",
        f"killed by SIGKILL after a second, {FLAPS} times, edited each time, some hundred calls a second",
    ) as told:
        _flap(tmp_path, told)


def _flap(folder: Path, told: Promise) -> None:
    with Town(folder / "town") as town:
        town.write("echo.yaml", SERVICE + ROUTE.format(edit=0))
        town.start_control_plane()
        for number in range(2):
            start_echo(town, f"echo-{number}")
        with meshlib.connect(town.target, workload="caller", cache_dir="-") as mesh, mesh.Client(timeout=60) as client:
            assert client.get("http://echo/").status_code == 200
            with load(client, "http://echo/", 2, 0.005) as calls:
                for edit in range(1, FLAPS + 1):
                    town.kill("control-plane")
                    town.write("echo.yaml", SERVICE + ROUTE.format(edit=edit))
                    town.start_control_plane(is_awaited=edit % 4 == 3)  # else it may die before it has begun
                    time.sleep(1.0)
                    calls.some_more(10)
                town.await_control_plane()
                ready = time.monotonic()
                eventually(lambda: edit_in_force(client) == FLAPS, "the last edit is in force")
                told.measured("the last edit in force after", time.monotonic() - ready, at_most=within(15.0))
                town.await_registered("echo-0", "echo-1")
                calls.some_more(20)
            assert calls.failures == []
            told.counted("calls", calls.calls)
            told.counted("calls that failed", 0)
            check_both_answer(client)


def edit_in_force(client: httpx.Client) -> int:
    return int(client.get("http://echo/").headers["x-edit"])


def check_both_answer(client: httpx.Client) -> None:
    seen: set[str] = set()

    def both() -> bool:
        seen.add(client.get("http://echo/").json()["instance"])
        return len(seen) == 2

    eventually(both, f"both endpoints answer, not only {seen}")
