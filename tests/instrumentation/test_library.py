"""Claims about the library that a pod is given: a Python that has nothing is on the mesh by it, or says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import meshlib
from instrumentation.world import WORLD
from meshlib.instrumentation.library import main
from peers import Answer, Peer

pytestmark = pytest.mark.processes

OWN = EXTENSION_SUFFIXES[0].split(".")[1]
CALL = "import httpx; print(httpx.get('http://reviews:9080/').text)"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As scripts/pod_library.py lays it out, for this Python, of what is installed beside these tests."""
    folder = tmp_path_factory.mktemp("library")
    package = Path(meshlib.__file__).parent
    shutil.copytree(package / "instrumentation" / "autostart", folder / "autostart")
    for name in ("any", "abi3", OWN):
        (folder / name).mkdir()
    installed = Path(sysconfig.get_paths()["platlib"])
    for each in (package, *installed.iterdir()):
        if each.suffix != ".pth" and each.name not in ("__pycache__", "sitecustomize.py"):
            (folder / "any" / each.name).symlink_to(each)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder


def ran(bare: Path, library: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MESHLIB_", "PYTHON"))}
    path = {"PYTHONPATH": str(library / "autostart"), "PYTHONWARNINGS": "error::ResourceWarning"}
    command = [str(bare / "bin" / "python"), "-c", code]
    return subprocess.run(
        command, env={**inherited, **path, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def installed_in(bare: Path) -> Path:
    (folder,) = bare.glob("lib/python*/site-packages")
    return folder


@contextmanager
def own_metadata(bare: Path, name: str, version: str) -> Iterator[None]:
    """The application has this distribution; what it says of its version."""
    folder = installed_in(bare) / f"{name}-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n{version}")
    try:
        yield
    finally:
        shutil.rmtree(folder)


def left_of(library: Path) -> str:
    """Code that prints which of the library's folders are searched, and what of meshlib is loaded."""
    return (
        f"import sys; print([each for each in sys.path if {str(library)!r} in each], "
        "[each for each in sys.modules if each.partition('.')[0] == 'meshlib'])"
    )


def test_a_python_that_has_nothing_is_on_the_mesh(bare: Path, library: Path, tmp_path: Path) -> None:
    """It calls a host that only the mesh knows."""
    with Peer(lambda received: Answer(body=b"by the mesh")) as peer:
        (tmp_path / "world.yaml").write_text(WORLD.format(port=peer.port))
        result = ran(bare, library, CALL, MESHLIB_CONTROL_PLANE=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "by the mesh\n", "")


def test_the_application_s_own_packages_come_first(bare: Path, library: Path) -> None:
    """What it was tested with stays what it runs with."""
    own = installed_in(bare) / "idna.py"
    own.write_text("")
    try:
        result = ran(bare, library, "import idna; print(idna.__file__)")
    finally:
        own.unlink()
    assert (result.stdout, result.stderr) == (f"{own}\n", "")


def test_what_is_too_old_for_the_mesh_is_told_and_the_application_runs(bare: Path, library: Path) -> None:
    """By name and version; nothing of the library is left, in its path or loaded."""
    with own_metadata(bare, "protobuf", "Version: 3.20.3\n"):
        result = ran(bare, library, left_of(library))
    assert (result.returncode, result.stdout) == (0, f"[{str(library / 'autostart')!r}] []\n")
    assert "is not on the mesh: protobuf 3.20.3 of the application is older than 5.29" in result.stderr


def test_an_application_with_another_meshlib_or_broken_metadata_runs_as_it_was(bare: Path, library: Path) -> None:
    """Its own meshlib comes first, and need not know of libraries."""
    own = installed_in(bare) / "meshlib"
    own.mkdir()
    (own / "__init__.py").write_text("")
    try:
        another = ran(bare, library, left_of(library))
    finally:
        shutil.rmtree(own)
    with own_metadata(bare, "PyYAML", ""):
        unknown = ran(bare, library, left_of(library))
    for result, why in (another, "No module named 'meshlib.instrumentation'"), (unknown, "pyyaml is missing, or does"):
        assert (result.returncode, result.stdout) == (0, f"[{str(library / 'autostart')!r}] []\n")
        assert f"is not on the mesh: {why}" in result.stderr


def test_a_version_with_fewer_numbers_is_not_older(bare: Path, library: Path) -> None:
    """6 is 6.0 (PEP 440)."""
    with own_metadata(bare, "PyYAML", "Version: 6\n"):
        assert ran(bare, library, "print('runs')").stderr == ""


def test_a_python_that_the_library_is_not_for_is_told(bare: Path, library: Path, tmp_path: Path) -> None:
    """An older one, or one of another C library: by the names of both."""
    other = tmp_path / "library"
    shutil.copytree(library / "autostart", other / "autostart")
    for name in ("any", "abi3", "cpython-39-s390x-linux-gnu"):
        (other / name).mkdir()
    result = ran(bare, other, "print('runs')")
    assert (result.returncode, result.stdout) == (0, "runs\n")
    assert f"the pod's library is for cpython-39-s390x-linux-gnu, and this is {OWN}" in result.stderr


def test_the_init_container_hands_over_root_and_library(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where it is started again. The root alone, for an image that has meshlib."""
    root, target = tmp_path / "root", tmp_path / "target"
    root.mkdir()
    monkeypatch.setenv("MESHLIB_ROOT", "a certificate")
    small = tmp_path / "library"
    shutil.copytree(library / "autostart", small / "autostart")
    for _ in range(2):
        assert main([str(root), str(small), str(target)]) == 0
    assert (root / "root-cert.pem").read_text() == "a certificate"
    assert (target / "autostart" / "sitecustomize.py").is_file()
    assert main([str(root)]) == 0


def test_an_image_without_a_library_ends_the_init_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pod must not begin off the mesh because of how an image was built; nor where nothing can be written."""
    monkeypatch.setenv("MESHLIB_ROOT", "a certificate")
    assert main([str(tmp_path), str(tmp_path / "none"), str(tmp_path / "target")]) == 1
    assert "build the image by meshlib's Containerfile" in capsys.readouterr().err
    assert main([str(tmp_path / "gone")]) == 1
    assert "gone" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to give it up")
def test_a_volume_is_roots_and_takes_the_library_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubelet makes an emptyDir for root, where everybody may write; its mode and times nobody else may change."""
    with tempfile.TemporaryDirectory() as folder:
        library_folder, root, target = (Path(folder) / each for each in ("library", "root", "target"))
        (library_folder / "autostart").mkdir(parents=True)
        (library_folder / "autostart" / "sitecustomize.py").write_text("")
        for each in (root, target):
            each.mkdir()
            each.chmod(0o777)
        Path(folder).chmod(0o755)
        monkeypatch.setenv("MESHLIB_ROOT", "root")
        os.seteuid(65532)
        try:
            status = main([str(root), str(library_folder), str(target)])
        finally:
            os.seteuid(0)
        assert status == 0
        assert (target / "autostart" / "sitecustomize.py").is_file()
