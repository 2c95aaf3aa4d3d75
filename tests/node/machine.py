"""A machine for one node of a cluster: namespaces of its own for processes, mounts and network, on this Linux.

What Docker is to kind, without Docker. All that is started in it, mounted in it, and written to its iptables is gone
with its first process, and that ends when this one does, however it ends. Outside it leaves a pair of network devices,
which go with it, cgroups, and a few settings of the kernel's, which stop() puts back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

HOST, NODE = "198.18.7.1", "198.18.7.2"
"""Of both ends of the cable: this machine's, where the API server is, and the node's."""
PODS = "10.244.7.0/24"
_DEVICE = "meshlib-node"
_CGROUPS = Path("/sys/fs/cgroup")
_TUNED = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
"""What a kubelet sets for the whole kernel."""
_NEEDED = ("unshare", "nsenter", "ip", "containerd", "runc", "iptables")
_CNI = ("/usr/lib/cni", "/opt/cni/bin")
_PATIENCE = 60.0

# The first process. It takes in whoever lost their parent, and ends with its standard input. A runtime that is used to
# one kind of cgroups sees one: a second hierarchy beside version 1 is unmounted here.
_FIRST = """
set -e
mount --make-rprivate /
mount -t tmpfs node /run
mount -t tmpfs node /var/log
mount -t tmpfs node /var/lib
mount --make-rshared /
if [ -d /sys/fs/cgroup/unified ]; then umount /sys/fs/cgroup/unified; fi
ip link set lo up
echo here
read -r _
ip address add {node}/30 dev eth0
ip link set eth0 up
ip route add default via {host}
echo 1 > /proc/sys/net/ipv4/ip_forward
if [ -e /proc/sys/net/bridge/bridge-nf-call-iptables ]; then echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables; fi
echo ready
while read -r _; do :; done
"""


def cni() -> Path | None:
    """Where the network plugins are."""
    return next((Path(each) for each in _CNI if (Path(each) / "bridge").is_file()), None)


def missing() -> str:
    """Why there can be no node here, "" if there can."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "a node is a Linux machine"
    if os.geteuid() != 0:
        return "a node takes root"
    lacking = [each for each in _NEEDED if shutil.which(each) is None]
    if cni() is None:
        lacking.append("the CNI plugins")
    return f"not installed: {', '.join(lacking)}" if lacking else ""


class Machine:
    """`with Machine(folder) as machine:`. folder: for its files; on a file system that overlayfs takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cgroup = f"/meshlib-node-{os.getpid()}"
        self._before = {each: (Path("/proc/sys") / each).read_text() for each in _TUNED}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._first: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for each in self._hierarchies():
            (each / self.cgroup.strip("/")).mkdir()
        words = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        script = _FIRST.format(node=NODE, host=HOST)
        self._first = subprocess.Popen(
            (*words, "bash", "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
        )
        assert self._first.stdin is not None and self._first.stdout is not None
        assert self._first.stdout.readline() == b"here\n", "the namespaces could not be made"
        run("ip", "link", "add", _DEVICE, "type", "veth", "peer", "name", "eth0", "netns", str(self._first.pid))
        run("ip", "address", "add", f"{HOST}/30", "dev", _DEVICE)
        run("ip", "link", "set", _DEVICE, "up")
        self._first.stdin.write(b"go\n")
        self._first.stdin.flush()
        assert self._first.stdout.readline() == b"ready\n", "the node's network could not be made"
        run("ip", "route", "add", PODS, "via", NODE)
        (child,) = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        self._enter = ("nsenter", "--target", child, "--mount", "--net", "--pid", "--uts", "--ipc", "--wd=/", "--")

    def start(self, name: str, *words: str, **environment: str) -> None:
        """A process of it, whose output goes to NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                (*self._enter, *words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment
            )

    def run(self, *words: str, patience: float = 300.0) -> str:
        """A command in it, and what it writes."""
        return run(*self._enter, *words, patience=patience)

    def check(self) -> None:
        """That all processes of it are still there."""
        for name, process in self._processes.items():
            assert process.poll() is None, f"{name} has ended: {self.log(name)[-3000:]}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """Everything in it is killed; the device goes with its network."""
        for process in self._processes.values():
            process.terminate()
        if self._first is not None:
            self._first.kill()
            self._first.wait(_PATIENCE)
            for pipe in (self._first.stdin, self._first.stdout):
                if pipe is not None:
                    pipe.close()
        for process in self._processes.values():
            process.wait(_PATIENCE)
        subprocess.run(("ip", "link", "delete", _DEVICE), stderr=subprocess.DEVNULL, check=False)
        for name, value in self._before.items():
            (Path("/proc/sys") / name).write_text(value)
        for each in self._hierarchies():
            _remove_cgroup(each / self.cgroup.strip("/"))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _hierarchies(self) -> list[Path]:
        """Of cgroups: the one of version 2, or each controller's."""
        if (_CGROUPS / "cgroup.controllers").exists():
            return [_CGROUPS]
        return [
            each for each in _CGROUPS.iterdir() if each.is_dir() and not each.is_symlink() and each.name != "unified"
        ]

    def __repr__(self) -> str:
        return f"<Machine {NODE} in {self.folder}>"


def run(*words: str, patience: float = 300.0) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=patience, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def _remove_cgroup(folder: Path) -> None:
    """The kernel may take a moment to let the dead go."""
    deadline = time.monotonic() + _PATIENCE
    while folder.exists():
        for each, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                Path(each).rmdir()
        assert time.monotonic() < deadline, f"{folder} is still in use"
        time.sleep(0.05)
