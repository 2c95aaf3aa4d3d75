"""Which credentials hold now? One source on a thread of its own, its latest word, and those who want to be told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from meshlib.identity.credentials import Credentials, CredentialsSource

_log = logging.getLogger("meshlib.identity")


class IdentityHolder:
    """The credentials of one process. Thread-safe; started once.

    make_source: given what is held at the start, by which a forked child proves who it is until it has a key of its
    own. present: those.
    """

    def __init__(
        self, make_source: Callable[[Credentials | None], CredentialsSource], present: Credentials | None = None
    ) -> None:
        self._make_source = make_source
        self.credentials = present
        """Replaced whole at each rotation; one attribute read."""
        self.rotations = 0
        """How often, in this process."""
        self._changed = threading.Condition()
        self._listeners: list[Callable[[Credentials], None]] = []
        self._source: CredentialsSource | None = None
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def start(self) -> None:
        """Returns at once; does nothing the second time and after stop()."""
        with self._changed:
            if self._source is not None or self._is_stopped:
                return
            source = self._source = self._make_source(self.credentials)
            self._thread = threading.Thread(
                target=source.run, args=(self._publish,), name="meshlib-identity", daemon=True
            )
            self._thread.start()

    def wait(self, timeout: float) -> Credentials | None:
        """The credentials, waited for at most so many seconds; None when there are none by then."""
        with self._changed:
            self._changed.wait_for(lambda: self.credentials is not None or self._is_stopped, timeout)
            return self.credentials

    def on_rotation(self, tell: Callable[[Credentials], None]) -> None:
        """`tell` is called with each new Credentials, on the identity's thread; it must not block."""
        with self._changed:
            self._listeners.append(tell)

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            source, thread = self._source, self._thread
        if source is not None:
            source.stop()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    def restarted(self) -> IdentityHolder:
        """For a forked child, where the thread is gone: the same, with the same listeners, not started."""
        child = IdentityHolder(self._make_source, self.credentials)
        child._listeners = list(self._listeners)
        return child

    def _publish(self, credentials: Credentials) -> None:
        with self._changed:
            self.rotations += self.credentials is not None
            self.credentials = credentials
            self._changed.notify_all()
            listeners = list(self._listeners)
        for tell in listeners:
            try:
                tell(credentials)
            except Exception:
                _log.exception("a listener failed at the rotation of %s", credentials.identity)

    def __repr__(self) -> str:
        return f"<IdentityHolder {self.credentials.identity if self.credentials else 'nobody yet'}>"
