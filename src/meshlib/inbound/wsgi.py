"""What does the mesh do around a WSGI application? It takes up what each request brings, for the calls made in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from meshlib.inbound import threads
from meshlib.inbound.asgi import GRPC_TOO_LATE, TOO_LATE
from meshlib.policy.propagation import REQUEST_ID, Carried, Intake, current, is_grpc

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger("meshlib.inbound")

_REQUEST_ID_KEY = "HTTP_X_REQUEST_ID"


class MeshWSGI:
    """A WSGI application around `app`: MeshASGI's promises, for a WSGI server.

    What a request brings is in force while `app` runs: in the call, in each step of the iterable it returns, and in
    that one's close(). forward_headers: as for MeshASGI. on_serving: called at once, since no WSGI server tells when it
    serves; must neither block nor raise.
    """

    __slots__ = ("_clock", "_intake", "_keys", "app")

    def __init__(
        self,
        app: WSGIApplication,
        *,
        forward_headers: Iterable[str] = (),
        on_serving: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self._intake = Intake(forward_headers)
        self._keys = tuple((_environ_key(name), name) for name in sorted(self._intake.names))
        self._clock = clock
        threads.install()
        if on_serving is not None:
            on_serving()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        brought = [(name, environ[key].encode("latin-1")) for key, name in self._keys if key in environ]
        carried = self._intake.take_up(brought, self._clock, current.get())
        if carried.has_expired():
            return _answer_too_late(environ, start_response)
        made = carried.headers[-1]
        if made[0] == REQUEST_ID:  # the application sees the id, as it would behind Envoy
            environ[_REQUEST_ID_KEY] = made[1].decode("latin-1")
        token = current.set(carried)
        try:
            result = self.app(environ, start_response)
        except BaseException:
            carried.finish()
            raise
        finally:
            current.reset(token)
        # Servers look for these very types: one block needs no chunks, and a file goes out through sendfile.
        if type(result) in (list, tuple) or type(result) is environ.get("wsgi.file_wrapper"):
            carried.finish()
            return result
        return _Body(result, carried)

    def __repr__(self) -> str:
        return f"<MeshWSGI {self.app!r}>"


class _Body:
    """The application's iterable, with what its request carries in force during each of its steps, on whichever thread
    the server takes them. Outside of them nothing is in force, so nothing leaks where a server forgets close()."""

    __slots__ = ("_carried", "_iterable", "_iterator")

    def __init__(self, iterable: Iterable[bytes], carried: Carried) -> None:
        self._iterable = iterable
        self._iterator: Iterator[bytes] | None = None
        self._carried = carried

    def __iter__(self) -> _Body:
        return self

    def __next__(self) -> bytes:
        token = current.set(self._carried)
        try:
            if self._iterator is None:
                self._iterator = iter(self._iterable)
            return next(self._iterator)
        except StopIteration:
            self._carried.finish()
            raise
        finally:
            current.reset(token)

    def close(self) -> None:
        self._carried.finish()
        close: Any = getattr(self._iterable, "close", None)
        if close is None:
            return
        token = current.set(self._carried)
        try:
            close()
        finally:
            current.reset(token)


def _environ_key(name: bytes) -> str:
    return "HTTP_" + name.decode("ascii").upper().replace("-", "_")


def _answer_too_late(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
    _log.info("%s %r: not started, the caller's deadline has passed", method, path)
    if is_grpc(environ.get("CONTENT_TYPE", "").encode("latin-1")):
        start_response("200 OK", [(name.decode(), value.decode()) for name, value in GRPC_TOO_LATE])
        return []
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(TOO_LATE)))]
    start_response("504 Gateway Timeout", headers)
    return [TOO_LATE]
