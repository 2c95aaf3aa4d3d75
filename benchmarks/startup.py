"""What does a process pay to begin on the mesh? `python -m benchmarks.startup`: each row is made by processes of its
own, bare and with the mesh: CPU time to import and to the end of the first call, and the memory that they hold then.

The call goes to a server beside them, through httpx; the mesh reads a folder of YAML.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from meshlib.testing import FakeMesh

MESH = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews}}
spec:
  hosts: [reviews.example]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
"""
CONNECT = "mesh = meshlib.connect('.', cache_dir='-', telemetry='off')\n"
CALL = "assert client.get(url).status_code == 200\n"
CLIENT = "import httpx\nclient = httpx.Client(trust_env=False)\n"
CONTESTANTS = {
    "python": "",
    "import httpx": "import httpx\n",
    "import meshlib": "import meshlib\n",
    "import grpc": "import grpc\n",
    "httpx, first call": f"{CLIENT}{CALL}",
    "meshed, first call": f"import meshlib\n{CONNECT}client = mesh.Client(trust_env=False)\n{CALL}",
    "meshlib.instrument, first call": f"import meshlib\n{CONNECT}meshlib.instrument(mesh)\n{CLIENT}{CALL}",
}
MEASURE = """
import json, time, pathlib, resource
wall, cpu = time.perf_counter(), time.process_time()
url = {url!r}
{program}
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
statm = pathlib.Path("/proc/self/statm")  # on Linux the most that was resident counts the parent's, too
pages = int(statm.read_text().split()[1]) if statm.exists() else 0
resident = pages * resource.getpagesize() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([cpu * 1e3, wall * 1e3, resident / 1024**2]))
for made in ("client", "mesh"):
    if made in globals():
        globals()[made].close()
"""


class Row(NamedTuple):
    """cpu, wall: milliseconds from the program's first line on. memory: MiB that are resident then."""

    contestant: str
    cpu: float
    wall: float
    memory: float


def measured(program: str, url: str, folder: Path) -> list[float]:
    """By a new process. Raises CalledProcessError."""
    text = MEASURE.format(url=url, program=program)
    ran = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    found: list[float] = json.loads(ran.stdout)
    return found


def rows(rounds: int) -> list[Row]:
    """Medians; the contestants take turns, so that a slow moment of the machine meets all of them."""
    samples: dict[str, list[list[float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as name, FakeMesh() as fake:
        folder, port = Path(name), fake.service("reviews").responds(body="ok").address[1]
        (folder / "mesh.yaml").write_text(MESH.format(port=port))
        for _ in range(rounds):
            for contestant, program in CONTESTANTS.items():
                host = "reviews.example" if "mesh" in contestant else f"127.0.0.1:{port}"
                samples[contestant].append(measured(program, f"http://{host}/", folder))
    return [Row(name, *map(statistics.median, zip(*found, strict=True))) for name, found in samples.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    print(f"{'':32}{'CPU ms':>8}{'wall ms':>9}{'MiB':>8}")
    for row in rows(1 if options.quick else options.rounds):
        print(f"{row.contestant:32}{row.cpu:8.0f}{row.wall:9.0f}{row.memory:8.1f}")


if __name__ == "__main__":
    main()
