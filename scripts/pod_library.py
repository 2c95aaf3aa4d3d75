"""Makes the library that is handed to Kubernetes' pods: meshlib and what it needs, for each Python that it supports.

    python scripts/pod_library.py WHEEL FOLDER

The Containerfile runs it. Nothing is compiled: wheels for Linux with glibc, of this machine's architecture. Whatever is
the same for every Python is there once. src/meshlib/instrumentation/library.py says how the folder is laid out.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
EXTRAS = "http2,quota"
BESIDE = ("opentelemetry-proto>=1.30",)  # of the extra `telemetry`; CEL, 50 MB for each Python, stays out
GLIBC = ("2014", "_2_17", "_2_27", "_2_28", "_2_34")


def main(wheel: Path, folder: Path) -> None:
    machine = platform.machine()
    with tempfile.TemporaryDirectory() as scratch:
        by_python = {
            f"cpython-{python.replace('.', '')}-{machine}-linux-gnu": downloaded(wheel, python, machine, Path(scratch))
            for python in PYTHONS
        }
        shared = set.intersection(*({each.name for each in wheels} for wheels in by_python.values()))
        for own, wheels in by_python.items():
            for each in wheels:
                *_, abi, _ = each.stem.split("-")
                unpack(each, folder / (own if each.name not in shared else "abi3" if abi == "abi3" else "any"))
    autostart = folder / "any" / "meshlib" / "instrumentation" / "autostart"
    shutil.copytree(autostart, folder / "autostart", dirs_exist_ok=True)


def downloaded(wheel: Path, python: str, machine: str, scratch: Path) -> list[Path]:
    platforms = [word for each in GLIBC for word in ("--platform", f"manylinux{each}_{machine}")]
    wanted, into = (f"{wheel}[{EXTRAS}]", *BESIDE), scratch / python
    pip("download", "--only-binary=:all:", "--python-version", python, *platforms, "--dest", str(into), *wanted)
    return sorted(into.glob("*.whl"))


def unpack(wheel: Path, into: Path) -> None:
    """Not by pip, which installs for its own Python. What else a wheel may bring (headers, commands) no pod needs."""
    with zipfile.ZipFile(wheel) as content:
        for each in content.infolist():
            first, _, rest = each.filename.partition("/")
            if not first.endswith(".data"):
                content.extract(each, into)
            elif rest.startswith(("purelib/", "platlib/")):
                sys.exit(f"{wheel.name} has {each.filename}, which would have to be moved")


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
