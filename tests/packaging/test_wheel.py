"""Does the wheel have what a program needs that was installed from it, and nothing else?"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as by `pip wheel`, without a network: the build backend is hatchling, and here it is."""
    folder = tmp_path_factory.mktemp("wheel")
    program = f"import hatchling.build; print(hatchling.build.build_wheel({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(folder / built.stdout.strip().splitlines()[-1])


def test_what_is_no_python_is_there_too(wheel: zipfile.ZipFile) -> None:
    """Types, messages, the page: every file below src/meshlib."""
    wanted = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "meshlib").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - set(wheel.namelist()) == set()
    assert "meshlib/py.typed" in wanted
    for name in ("controlplane/dashboard/index.html", "controlplane/dashboard/app.js", "xds/descriptors.binpb"):
        assert f"meshlib/{name}" in wanted


def test_nothing_else_is_there(wheel: zipfile.ZipFile) -> None:
    """No tests, no benchmarks, nothing that was made meanwhile."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"meshlib", next(top for top in tops if top.endswith(".dist-info"))}
    left = ("__pycache__", ".pyc", "/test_", "conftest", "/tests/")
    assert [name for name in wheel.namelist() if any(part in name for part in left)] == []


def test_it_says_who_it_is(wheel: zipfile.ZipFile) -> None:
    """Name, Python, license and the command."""
    (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
    said = BytesParser().parsebytes(wheel.read(name))
    assert (said["Name"], said["Requires-Python"], said["License-Expression"]) == (
        "meshlib-proxyless",
        ">=3.11",
        "Apache-2.0",
    )
    points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "meshctl = meshlib.cli:main" in points
    assert "pytest11" not in points  # pytest would rewrite the assertions of every module that a plugin comes with


@pytest.mark.processes
def test_it_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked in front of everything else: it is this one that is imported, and it takes no client library with it."""
    wheel.extractall(tmp_path)
    program = (
        "import sys; sys.path.insert(0, '.'); import meshlib; print(meshlib.__file__)\n"
        "print(sorted({'httpx', 'requests', 'aiohttp', 'grpc', 'urllib3', 'yaml', 'pytest'} & set(sys.modules)))\n"
        "with meshlib.connect('', telemetry='off') as mesh:\n"
        "    mesh.Client().close()\n"
        "import meshlib.xds.messages\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    file, loaded = ran.stdout.splitlines()
    assert Path(file).resolve().is_relative_to(tmp_path.resolve())
    assert loaded == "[]"
