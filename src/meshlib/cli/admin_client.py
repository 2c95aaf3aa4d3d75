"""How does meshctl ask the control plane? It finds the admin API, asks, and turns every failure into one sentence."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import httpx
import msgspec

from meshlib.cli import connection
from meshlib.cli.failure import CommandFailed
from meshlib.controlplane import admin_api as api
from meshlib.version import __version__

TIMEOUT = 30.0
T = TypeVar("T")
Query = Mapping[str, str] | Sequence[tuple[str, str]]


class AdminClient:
    """The admin API at `url`; without one, of the chosen context, of the control plane that announced itself, or at the
    usual address. Who is typing: see connection.py.

    Every method raises CommandFailed.
    """

    def __init__(self, url: str = "", transport: httpx.BaseTransport | None = None) -> None:
        try:
            chosen = connection.chosen(url)
        except connection.BadConnection as error:
            raise CommandFailed(str(error)) from None
        self.url, self._has_token = chosen.url, bool(chosen.token)
        headers = {"user-agent": f"meshctl/{__version__} ({_user()})"}
        if chosen.token:
            headers["authorization"] = f"Bearer {chosen.token}"
        try:
            # trust_env=False: a proxy of the environment can't reach this machine's loopback.
            self._http = httpx.Client(
                base_url=self.url,
                timeout=TIMEOUT,
                trust_env=False,
                verify=chosen.verify,
                transport=transport,
                headers=headers,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise CommandFailed(f"--control-plane {url!r} is no URL: {type(error).__name__}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def version(self) -> api.Version:
        return self.get("/version", {}, api.Version)

    def objects(self, kind: str = "", namespace: str = "", name: str = "") -> tuple[api.StoredObject, ...]:
        return self.get("/v1/objects", {"kind": kind, "namespace": namespace, "name": name}, api.Objects).objects

    def problems(self) -> tuple[api.Problem, ...]:
        return self.get("/v1/problems", {}, api.Problems).problems

    def clients(self) -> tuple[api.Client, ...]:
        return self.get("/v1/clients", {}, api.Clients).clients

    def endpoints(self, namespace: str = "", name: str = "") -> tuple[api.ServiceEndpoints, ...]:
        return self.get("/v1/endpoints", {"namespace": namespace, "name": name}, api.Endpoints).services

    def apply(self, text: str, source: str, namespace: str = "") -> api.Results:
        return self._post("/v1/apply", {"source": source, "namespace": namespace}, text)

    def delete(self, text: str, source: str, namespace: str = "") -> api.Results:
        return self._post("/v1/delete", {"source": source, "namespace": namespace}, text)

    def delete_named(self, kind: str, namespace: str, name: str) -> api.Results:
        return self._post("/v1/delete", {"kind": kind, "namespace": namespace, "name": name}, "")

    def get(self, path: str, query: Query, shape: type[T]) -> T:
        """The answer to `path`, in this shape; empty parameters are left out, pairs may repeat a name."""
        return self._answer("GET", path, query, None, shape)

    def post(self, path: str, query: Mapping[str, str], shape: type[T]) -> T:
        """As `get`, for what changes something."""
        return self._answer("POST", path, query, b"", shape)

    def events(self, path: str, query: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """(name, JSON) of each server-sent event that `path` answers with, as long as they come."""
        parameters = {key: value for key, value in query.items() if value}
        try:
            with self._http.stream("POST", path, params=parameters, headers={"content-type": api.YAML}) as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._failure(path, response)
                name = ""
                for line in response.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        yield name, value
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None

    def _post(self, path: str, query: Mapping[str, str], text: str) -> api.Results:
        return self._answer("POST", path, query, text.encode(), api.Results)

    def _answer(self, method: str, path: str, query: Query, body: bytes | None, shape: type[T]) -> T:
        headers = {} if body is None else {"content-type": api.YAML}
        pairs = query.items() if isinstance(query, Mapping) else query
        parameters = tuple((key, value) for key, value in pairs if value)
        try:
            response = self._http.request(method, path, params=parameters, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        if response.status_code < 400 or (response.status_code == 422 and shape is api.Results):
            try:
                return msgspec.json.decode(response.content, type=shape)
            except msgspec.DecodeError:
                raise self._stranger(path, response) from None
        raise self._failure(path, response)

    def _unreachable(self, error: Exception) -> CommandFailed:
        if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return CommandFailed(f"{self.url} does not answer: {str(error) or type(error).__name__}")
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return CommandFailed(
                f"{self.url}: its certificate is not good here: {str(error).partition('failed: ')[2] or error}\n"
                "name the root that vouches for it: --ca FILE, or `ca` of a context"
            )
        return CommandFailed(
            f"no control plane is running at {self.url}\n"
            "start one:       meshctl demo, or meshctl control-plane FOLDER\n"
            "or name another: --control-plane URL (or MESHCTL_ADMIN) with the address of its admin API"
        )

    def _failure(self, path: str, response: httpx.Response) -> CommandFailed:
        """response: read, with a status of 400 or more."""
        try:
            reason = msgspec.json.decode(response.content, type=api.Failure).error
        except msgspec.DecodeError:
            return self._stranger(path, response)
        if response.status_code == 401 and self._has_token:
            reason = f"{self.url} does not know the token, or not any more"
        return CommandFailed(reason)

    def _stranger(self, path: str, response: httpx.Response) -> CommandFailed:
        return CommandFailed(
            f"{self.url}{path} answered {response.status_code}, but not as a control plane does: is it another server?"
        )


def _user() -> str:
    """As the system calls whoever types. Nobody verifies it; it is a help to read the audit log by."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "?"
    return "".join(each if each.isascii() and each.isprintable() else "?" for each in name[:60])
