"""What does a process pay to begin on the mesh? Each row is made by processes of its own, bare and with the mesh:
time to import and to the end of the first call, and the memory that they hold then.

The call goes to a server beside them, through httpx; the mesh reads a folder of YAML. Bytecode is there, as pip leaves
it when it installs a package: a process that has to compile ours first takes twice as long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.effort import FAST, FULL, Effort
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
NO_CLIENT = "import sys\nassert not {'httpx', 'requests', 'urllib3', 'aiohttp', 'grpc'} & sys.modules.keys()\n"
PYTHON, IMPORT = "python", "import meshlib"
FIRST_BARE, FIRST_MESHED = "httpx, first call", "meshed, first call"
CONTESTANTS = {
    PYTHON: "",
    "import httpx": "import httpx\n",
    IMPORT: f"import meshlib\n{NO_CLIENT}",
    "import grpc": "import grpc\n",
    FIRST_BARE: f"{CLIENT}{CALL}",
    FIRST_MESHED: f"import meshlib\n{CONNECT}client = mesh.Client(trust_env=False)\n{CALL}",
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
    """By round. cpu_ms, wall_ms: from the program's first line on. mib: MiB that are resident then."""

    what: str
    cpu_ms: list[float]
    wall_ms: list[float]
    mib: list[float]


def measured(program: str, url: str, folder: Path, bytecode: Path) -> list[float]:
    """By a new process. Raises CalledProcessError."""
    text = MEASURE.format(url=url, program=program)
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    ran = subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: list[float] = json.loads(ran.stdout)
    return found


def measure(effort: Effort) -> dict[str, Any]:
    """The contestants take turns, so that a slow moment of the machine meets all of them."""
    rounds = {FULL.name: 15, FAST.name: 3}.get(effort.name, 1)
    rows = {name: Row(name, [], [], []) for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as name, FakeMesh() as fake:
        folder, bytecode = Path(name, "mesh"), Path(name, "bytecode")
        port = fake.service("reviews").responds(body="ok").address[1]
        folder.mkdir()
        (folder / "mesh.yaml").write_text(MESH.format(port=port))
        for number in range(rounds + 1):
            for contestant, program in CONTESTANTS.items():
                host = "reviews.example" if "mesh" in contestant else f"127.0.0.1:{port}"
                found = measured(program, f"http://{host}/", folder, bytecode)
                if not number:
                    continue  # the first round of all compiles
                for figures, figure in zip(rows[contestant][1:], found, strict=True):
                    figures.append(figure)  # type: ignore[attr-defined]
    return {"rows": [row._asdict() for row in rows.values()]}
