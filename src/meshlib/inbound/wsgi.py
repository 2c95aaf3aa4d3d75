"""What does the mesh do around a WSGI application? It takes up what each request brings, for the calls made in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from meshlib.inbound import peer as peers
from meshlib.inbound import threads
from meshlib.inbound.admit import Reception, Take, answer_of, seen_by_application, without_params
from meshlib.inbound.asgi import GRPC_TOO_LATE, TOO_LATE, nobody
from meshlib.inbound.body import ReplayedInput
from meshlib.model import Headers, Peer, Request
from meshlib.policy.admission import PROBE, Allow, Deny
from meshlib.policy.observer import Observer, Served, size_of
from meshlib.policy.propagation import REQUEST_ID, Carried, Intake, current, is_grpc

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger("meshlib.inbound")

_REQUEST_ID_KEY = "HTTP_X_REQUEST_ID"


class MeshWSGI:
    """A WSGI application around `app`: MeshASGI's promises, for a WSGI server.

    What a request brings is in force while `app` runs: in the call, in each step of the iterable it returns, and in
    that one's close(). forward_headers: as for MeshASGI. on_serving: called at once, since no WSGI server tells when it
    serves; must neither block nor raise. reception: as for MeshASGI, with the same keys in the environ.
    observer: as for MeshASGI.
    """

    __slots__ = ("_clock", "_intake", "_keys", "_observer", "_reception", "app")

    def __init__(
        self,
        app: WSGIApplication,
        *,
        forward_headers: Iterable[str] = (),
        on_serving: Callable[[], None] | None = None,
        reception: Reception | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: Callable[[], Observer | None] = nobody,
    ) -> None:
        self.app = app
        self._reception = reception
        self._observer = observer
        self._intake = Intake(forward_headers)
        self._keys = tuple((_environ_key(name), name) for name in sorted(self._intake.names))
        self._clock = clock
        threads.install()
        if on_serving is not None:
            on_serving()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        observer = self._observer()
        if observer is None:
            return self._serve(environ, start_response, None, None)
        served = _served(environ, self._clock())
        watch = _Watch(served, observer, self._clock)
        try:
            result = self._serve(environ, watch.start_response(start_response), observer, served)
        except BaseException:
            if served.status == 0:
                served.status = 500  # what every server answers then
            watch.ended()
            raise
        if type(result) in (list, tuple):
            served.response_bytes += sum(map(len, result))
            watch.ended()
            return result
        if type(result) is environ.get("wsgi.file_wrapper"):
            watch.ended()
            return result
        return _Watched(result, watch)

    def _serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        observer: Observer | None,
        served: Served | None,
    ) -> Iterable[bytes]:
        if self._reception is not None:
            peer = peers.of_environ(environ)
            verdict = self._reception.admit(request_of(environ), peer, _taking(environ))
            if isinstance(verdict, Deny):
                if served is not None:
                    served.flags, served.reason = verdict.flag, verdict.details
                return _refuse(environ, start_response, verdict)
            if verdict is PROBE and served is not None:
                served.is_probe = True
            if self._reception.is_enforced:
                _admit(environ, verdict, peer)
                start_response = _adding(verdict, start_response) if verdict.answer else start_response
        brought = [(name, environ[key].encode("latin-1")) for key, name in self._keys if key in environ]
        carried = self._intake.take_up(brought, self._clock, current.get())
        if observer is not None and served is not None and not served.is_probe:
            served.carried = carried
            carried = observer.serving(served) or carried
        if carried.has_expired():
            if served is not None:
                served.flags = "UT"
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


def request_of(environ: WSGIEnvironment) -> Request:
    """The request, as the caller wrote it where the server tells; else as the application sees it."""
    raw = str(environ.get("RAW_URI") or environ.get("REQUEST_URI") or "")
    if not raw.startswith("/"):  # absolute form, or not told
        script, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
        query = environ.get("QUERY_STRING", "")
        raw = quote((script + path).encode("latin-1")) + (f"?{query}" if query else "")
    headers = Headers(_raw_headers(environ))
    scheme = environ.get("wsgi.url_scheme", "http")
    return Request(environ["REQUEST_METHOD"], scheme, (headers.get("host") or "").lower(), raw or "/", headers)


def _taking(environ: WSGIEnvironment) -> Take:
    def take(limit: int) -> bytes:
        found = environ["wsgi.input"]
        if not isinstance(found, ReplayedInput):
            environ["wsgi.input"] = found = ReplayedInput(environ)
        taken: bytes = found.take(limit)
        return taken

    return take


def _raw_headers(environ: WSGIEnvironment) -> list[tuple[bytes, bytes]]:
    found = [
        (key[5:].replace("_", "-").lower().encode("latin-1"), str(value).encode("latin-1", "replace"))
        for key, value in environ.items()
        if key.startswith("HTTP_")
    ]
    for key, name in (("CONTENT_TYPE", b"content-type"), ("CONTENT_LENGTH", b"content-length")):
        if environ.get(key):
            found.append((name, str(environ[key]).encode("latin-1", "replace")))
    return found


def _admit(environ: WSGIEnvironment, verdict: Allow, peer: Peer) -> None:
    before = dict(_raw_headers(environ))
    after = dict(seen_by_application(list(before.items()), verdict, peer))
    for name in before.keys() - after.keys():
        environ.pop(_environ_key(name), None)
    for name, value in after.items():
        if before.get(name) != value:
            environ[_environ_key(name)] = value.decode("latin-1")
    if verdict.remove_params:
        query = without_params(environ.get("QUERY_STRING", "").encode("latin-1"), verdict)
        environ["QUERY_STRING"] = query.decode("latin-1")
        for key in ("RAW_URI", "REQUEST_URI"):
            if key in environ:
                stem = str(environ[key]).partition("?")[0]
                environ[key] = f"{stem}?{environ['QUERY_STRING']}" if query else stem
    environ[peers.PEER] = peer
    if verdict.claims is not None:
        environ[peers.PRINCIPAL], environ[peers.CLAIMS] = verdict.principal, verdict.claims


def _adding(verdict: Allow, start_response: StartResponse) -> StartResponse:
    added = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in verdict.answer]

    def adding(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
        return start_response(status, [*headers, *added], *rest)

    return adding


def _refuse(environ: WSGIEnvironment, start_response: StartResponse, denied: Deny) -> Iterable[bytes]:
    status, headers, body = answer_of(denied, environ.get("CONTENT_TYPE", "").encode("latin-1"))
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Refused"
    shown = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    start_response(f"{status} {phrase}", shown)
    return [body] if body else []


def _served(environ: WSGIEnvironment, now: float) -> Served:
    query = environ.get("QUERY_STRING")
    served = Served(
        environ["REQUEST_METHOD"],
        f"{environ.get('PATH_INFO', '')}?{query}" if query else environ.get("PATH_INFO", ""),
        Headers(_raw_headers(environ)),
        now,
        environ.get("SERVER_PROTOCOL", "HTTP/1.1"),
    )
    served.authority = environ.get("HTTP_HOST", "")
    served.client = environ.get("REMOTE_ADDR", "")
    port = str(environ.get("REMOTE_PORT") or "")
    served.client_port = int(port) if port.isdecimal() else 0
    length = environ.get("CONTENT_LENGTH") or "0"  # no WSGI server shows what it reads
    served.request_bytes = (int(length) if length.isdigit() else 0) + size_of(served.headers)
    served.peer = peers.of_environ(environ)
    return served


class _Watch:
    """One request, as its observer will be told."""

    __slots__ = ("_clock", "_is_over", "_observer", "served")

    def __init__(self, served: Served, observer: Observer, clock: Callable[[], float]) -> None:
        self.served, self._observer, self._clock = served, observer, clock
        self._is_over = False

    def start_response(self, start_response: StartResponse) -> StartResponse:
        def watched(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            self.served.status = int(status[:3]) if status[:3].isdigit() else 0
            self.served.response_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
            if status.startswith("200") and headers:
                self.served.grpc_status = next((each[1] for each in headers if each[0].lower() == "grpc-status"), "")
            return start_response(status, headers, *rest)

        return watched

    def ended(self) -> None:
        if not self._is_over:
            self._is_over = True
            self.served.ended = self._clock()
            if not self.served.is_probe:
                self._observer.served(self.served)


class _Watched:
    """A streamed answer whose bytes are counted. Its request ends with it."""

    __slots__ = ("_iterable", "_iterator", "_watch")

    def __init__(self, iterable: Iterable[bytes], watch: _Watch) -> None:
        self._iterable, self._watch = iterable, watch
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> _Watched:
        return self

    def __next__(self) -> bytes:
        if self._iterator is None:
            self._iterator = iter(self._iterable)
        try:
            chunk = next(self._iterator)
        except BaseException as error:
            if not isinstance(error, StopIteration) and self._watch.served.status == 0:
                self._watch.served.status = 500
            self._watch.ended()
            raise
        self._watch.served.response_bytes += len(chunk)
        return chunk

    def close(self) -> None:
        try:
            close: Any = getattr(self._iterable, "close", None)
            if close is not None:
                close()
        finally:
            self._watch.ended()


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
