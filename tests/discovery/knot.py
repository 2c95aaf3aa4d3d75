"""Knot DNS, a name server that others run in earnest, with a zone that a test changes. Debian's package `knot`."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

KNOTD = shutil.which("knotd") or shutil.which("knotd", path="/usr/sbin:/usr/local/sbin")
PATIENCE = 30.0

_CONFIG = """
server:
    rundir: "{folder}"
    listen: 127.0.0.1@{port}
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: "{folder}"
log:
  - target: stderr
    any: info
zone:
  - domain: test
    file: "{folder}/test.zone"
    storage: "{folder}"
    journal-content: none
    semantic-checks: off
"""
_HEAD = """$ORIGIN test.
@ 5 SOA ns root {serial} 3600 600 86400 5
@ 5 NS ns
ns 5 A 127.0.0.1
"""


class Knot:
    """`with Knot(folder) as server: server.set("a 1 A 127.0.0.1")`, in the zone `test`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._serial = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    def set(self, *records: str) -> None:
        """The zone from now on. Returns when it is served."""
        self._write(*records)
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)
            self._until_served()

    def _write(self, *records: str) -> None:
        self._serial += 1
        new = self._folder / "test.zone.new"
        new.write_text(_HEAD.format(serial=self._serial) + "\n".join(records) + "\n")
        new.replace(self._folder / "test.zone")

    def start(self) -> None:
        """Again after kill(), with the same port and what the zone has become meanwhile."""
        assert KNOTD is not None
        if not self.port:
            self.port = _free_port()
        (self._folder / "knot.conf").write_text(_CONFIG.format(folder=self._folder, port=self.port))
        with (self._folder / "knot.log").open("ab") as log:
            self._process = subprocess.Popen(
                [KNOTD, "-c", str(self._folder / "knot.conf")], stdout=log, stderr=subprocess.STDOUT
            )
        self._until_served()

    def kill(self, *records: str) -> None:
        """SIGKILL; with `records` it will come back with another zone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(PATIENCE)
        self._process = None
        if records:
            self._write(*records)

    def _until_served(self) -> None:
        import dns.exception
        import dns.message
        import dns.query

        question = dns.message.make_query("test.", "SOA")
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self._process is not None
            ended = self._process.poll()
            log = (self._folder / "knot.log").read_text()
            assert ended is None, log
            try:
                reply = dns.query.udp(question, "127.0.0.1", timeout=0.2, port=self.port)
                if reply.answer and reply.answer[0][0].serial == self._serial:
                    return
            except (dns.exception.DNSException, OSError):
                pass
            assert time.monotonic() < deadline, log
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._write()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)


def _free_port() -> int:
    """Free for UDP and TCP."""
    for _ in range(20):
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port: int = tcp.getsockname()[1]
            try:
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free for both UDP and TCP")
