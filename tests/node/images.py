"""The images of a node, built without a registry: by buildah, from the repository's own files, on Debian's Python.

`python tests/node/images.py FOLDER` brings FOLDER/*.tar up to date. Layers, and the base, are kept in it. `--missing`
says which programs that takes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = ROOT / ".venv" / "go" / "bin"
DEBIAN = "bookworm"
BASE = "localhost/python"
ARCHIVES = ("pause.tar", "coredns.tar", "meshlib.tar", "bookinfo.tar")
_INCLUDED = "python3,python3-venv,python3-pip,ca-certificates"
# In images of Python `python` is it, and pip may install beside it.
_HOOK = 'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED; ln -s python3 "$1/usr/bin/python"'


def missing() -> str:
    """Which programs they take and are not here, "" if they are."""
    return ", ".join(each for each in ("buildah", "mmdebstrap") if shutil.which(each) is None)


class Images:
    """folder: where archives, and what buildah keeps, are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self) -> tuple[Path, ...]:
        """Archives of all images, under the names that manifests have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        base = self.folder / f"{DEBIAN}.tar"
        if not base.exists():
            made = base.with_suffix(".part.tar")
            include, hook = f"--include={_INCLUDED}", f"--customize-hook={_HOOK}"
            _run("mmdebstrap", "--quiet", "--variant=minbase", include, hook, DEBIAN, str(made))
            made.rename(base)
        if not self._buildah("images", "--quiet", "--filter", f"reference={BASE}").strip():
            self._single(BASE, base, "/", "python")
        self._single("localhost/pause:node", BUILT / "pause", "/pause", "/pause")
        self._single("localhost/coredns:node", BUILT / "coredns", "/coredns", "/coredns")
        # The repository's own, as they are.
        self._from_file("Containerfile", "localhost/meshlib:dev")
        self._from_file("examples/bookinfo/Dockerfile", "localhost/bookinfo-meshlib:latest")
        return (
            self._saved("localhost/pause:node", "pause.tar", "localhost/pause:node"),
            self._saved("localhost/coredns:node", "coredns.tar", "localhost/coredns:node"),
            self._saved("localhost/meshlib:dev", "meshlib.tar", "docker.io/library/meshlib:dev"),
            self._saved(
                "localhost/bookinfo-meshlib:latest", "bookinfo.tar", "docker.io/library/bookinfo-meshlib:latest"
            ),
        )

    def _single(self, name: str, file: Path, place: str, command: str) -> None:
        """An image of one file, or of what an archive holds; one of the same content is kept."""
        mark = f"made-of={hashlib.sha256(file.read_bytes()).hexdigest()}"
        if self._buildah("images", "--quiet", "--filter", f"reference={name}", "--filter", f"label={mark}").strip():
            return
        container = self._buildah("from", "scratch").strip()
        self._buildah("add", "--quiet", container, str(file), place)
        self._buildah("config", "--entrypoint", f'["{command}"]' if place != "/" else "[]", container)
        self._buildah("config", "--label", mark, container)
        self._buildah("commit", "--quiet", "--rm", container, name)

    def _from_file(self, file: str, name: str) -> None:
        """chroot: a build needs no cgroups. With this machine's network, and its certificates: a proxy may have one."""
        words = ("--isolation=chroot", "--network=host", "--layers", f"--build-arg=PYTHON={BASE}")
        certificates = "--volume=/etc/ssl/certs:/etc/ssl/certs:ro"
        self._buildah("build", *words, certificates, "--file", str(ROOT / file), "--tag", name, str(ROOT))

    def _saved(self, name: str, file: str, under: str) -> Path:
        """Only if it is another image than the one that was written last."""
        archive, written = self.folder / file, self.folder / f"{file}.id"
        identity = self._buildah("images", "--quiet", "--no-trunc", "--filter", f"reference={name}")
        if not archive.exists() or not written.exists() or written.read_text() != identity:
            for each in (written, archive):
                each.unlink(missing_ok=True)
            self._buildah("push", "--quiet", name, f"docker-archive:{archive}:{under}")
            written.write_text(identity)
        return archive

    def _buildah(self, *words: str) -> str:
        """In mounts of its own, which are gone with it."""
        places = (f"--root={self.folder}/storage", f"--runroot={self.folder}/run", "--storage-driver=overlay")
        return _run("unshare", "--mount", "buildah", *places, *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    if sys.argv[1:] == ["--missing"]:
        print(f"not installed, and needed to build images: {missing()}" if missing() else "", end="")
        raise SystemExit
    for each in Images(Path(sys.argv[1]).resolve()).build():
        print(each)
