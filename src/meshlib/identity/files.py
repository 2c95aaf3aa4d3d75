"""Who does a folder say that we are? tls.crt, tls.key and ca.crt, as cert-manager writes them, watched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from meshlib.identity.credentials import Credentials
from meshlib.identity.pem import BadCredentials, credentials_of

_log = logging.getLogger("meshlib.identity")

CERTIFICATE, KEY, ROOTS = "tls.crt", "tls.key", "ca.crt"
LOOK_AGAIN = 5_000
"""Milliseconds after which the files are read without a notice: network file systems send none."""


class FilesSource:
    """Credentials from `folder`. A CredentialsSource.

    A Kubernetes secret is swapped by a symbolic link in the folder, which is a change of the folder. Files that do not
    belong together (a writer is between two of them) wait for the next change; the last good ones stay.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop = threading.Event()

    def run(self, publish: Callable[[Credentials], None]) -> None:
        from watchfiles import watch

        last: Credentials | None = None
        told = ""
        while not self._stop.is_set():
            try:
                found = self._read()
                if found != last:
                    publish(found)
                    last, told = found, ""
                # Watched after the first look, and looked at before each notice: nothing falls in between for long.
                for _ in watch(
                    self._folder,
                    stop_event=self._stop,
                    recursive=False,
                    rust_timeout=LOOK_AGAIN,
                    yield_on_timeout=True,
                    raise_interrupt=False,
                    debounce=50,
                ):
                    break
            except (OSError, BadCredentials) as error:
                if str(error) != told:
                    told = str(error)
                    _log.warning("no new credentials from %s: %s", self._folder, error)
                self._stop.wait(0.2)

    def stop(self) -> None:
        self._stop.set()

    def _read(self) -> Credentials:
        chain, key, roots = ((self._folder / name).read_bytes() for name in (CERTIFICATE, KEY, ROOTS))
        return credentials_of(chain, key, roots)

    def __repr__(self) -> str:
        return f"<FilesSource {self._folder}>"
