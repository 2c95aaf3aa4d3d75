"""Does the wheel install and work under each Python that pyproject.toml names? `make test-pythons` says which are here.

What it needs is fetched from the package index, a minute for each: without MESHLIB_TEST_PYTHONS it is skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peers import Answer, Peer

ROOT = Path(__file__).parents[2]
PYTHONS = os.environ.get("MESHLIB_TEST_PYTHONS", "").split()
CONFIGURATION = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews}}
spec:
  hosts: [reviews]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
"""
MESHED = """
import meshlib
with meshlib.connect("mesh-config/", cache_dir="-") as mesh, mesh.Client(trust_env=False) as client:
    print(client.get("http://reviews/").text)
"""
UNCHANGED = "import httpx; print(httpx.get('http://reviews/', trust_env=False).text)"


def test_the_classifiers_say_from_which_python_on() -> None:
    """The first of them is what pip asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert project["requires-python"] == f">={said[0]}"
    assert [int(each.partition(".")[2]) for each in said] == list(range(11, 11 + len(said)))


@pytest.mark.processes
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHONS, reason="`make test-pythons` runs it with the Pythons of this machine")
@pytest.mark.parametrize("python", PYTHONS)
def test_the_wheel_works_with(python: str, tmp_path: Path) -> None:
    """Installed into an empty environment: the command, a call of the mesh, and an unchanged program, no warning."""
    built = subprocess.run(
        [sys.executable, "-c", f"import hatchling.build; print(hatchling.build.build_wheel({str(tmp_path)!r}))"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    wheel = tmp_path / built.stdout.strip().splitlines()[-1]

    def run(*command: str, timeout: float = 120) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MESHLIB_", "PYTHON"))}
        told = {**kept, "MESHLIB_CACHE_DIR": "-", "MESHLIB_CONTROL_PLANE": "mesh-config/", "HOME": str(tmp_path)}
        ran = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=timeout)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    run(python, "-m", "venv", "its")
    bin_folder = tmp_path / "its" / "bin"
    run(str(bin_folder / "pip"), "install", "--quiet", "--disable-pip-version-check", f"{wheel}[all]", timeout=600)
    (tmp_path / "mesh-config").mkdir()
    with Peer(lambda _: Answer(body=b"from reviews")) as peer:
        (tmp_path / "mesh-config" / "reviews.yaml").write_text(CONFIGURATION.format(port=peer.port))
        its = str(bin_folder / "python")
        assert run(its, "-W", "error", "-c", MESHED) == "from reviews"
        assert run(str(bin_folder / "meshctl"), "run", "--", its, "-W", "error", "-c", UNCHANGED) == "from reviews"
    assert re.search(r"\d+\.\d+", run(str(bin_folder / "meshctl"), "version"))
