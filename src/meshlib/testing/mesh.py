"""What stands for the mesh in a test? FakeMesh: a Mesh whose feed is the test, and that remembers each call made.

Routing, retries, timeouts, breakers and limits are the real ones; only who serves what is the test's word.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from meshlib.errors import SettingsError
from meshlib.istio import resources as r
from meshlib.istio.parse import parse_text, parse_value
from meshlib.istio.translate import translate
from meshlib.mesh import Mesh
from meshlib.policy.observer import Attempt, Call, Served
from meshlib.settings import Settings
from meshlib.testing.http import LoopThread
from meshlib.testing.ports import HOST
from meshlib.testing.services import FakeGrpcService, FakeService

K = TypeVar("K", FakeService, FakeGrpcService)
_WHO_SERVES_WHAT = (r.ServiceEntry, r.Service, r.Endpoints, r.EndpointSlice, r.Pod)
_REGISTRY_ONLY = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "istio", "namespace": "istio-system"},
    "data": {"mesh": "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"},
}


class CallMade(NamedTuple):
    """One call that the application has made, however many tries it took.

    authority: `reviews:9080`. status: what the application got; 0 is none, since it was raised. flags: Envoy's, "" is
    none. attempts: tries, also those that never reached a service. grpc_status: "" where the call is not gRPC.
    """

    authority: str
    method: str
    path: str
    status: int
    flags: str
    reason: str
    attempts: int
    grpc_status: str


class FakeMesh(Mesh):
    """A Mesh for tests: hand it to what takes a meshlib.Mesh. Also a context manager; closing it closes its services.

    A host that no test has named is answered with 502, so no test calls the world by mistake. settings: any field of
    Settings; the environment is not read.
    """

    def __init__(self, **settings: Any) -> None:
        if unknown := sorted(set(settings) - set(Settings.__dataclass_fields__)):
            raise SettingsError(f"unknown setting {unknown[0]!r}; there are {', '.join(Settings.__dataclass_fields__)}")
        super().__init__(replace(Settings(cache_dir="-", telemetry="off"), **settings))
        self.calls: list[CallMade] = []
        """Made so far, in the order in which they ended: with the response's body."""
        self._observer = _Remember(self.calls)
        self._saying = threading.Lock()
        self._services: list[FakeService | FakeGrpcService] = []
        self._applied: tuple[r.Object, ...] = ()
        self._loop: LoopThread | None = None
        self._version = 0
        self.start()
        self._put_into_force(())

    # Who serves what

    def service(self, authority: str, *, labels: Mapping[str, str] | None = None) -> FakeService:
        """The fake service that is called as `http://<authority>/`; without a port it is 80. The same again for the
        same name and labels. With other labels (`{"version": "v2"}`) it is one more endpoint of the same service."""
        with self._saying:
            if (known := self._known(authority, labels or {}, FakeService)) is not None:
                return known
            if self._loop is None:
                self._loop = LoopThread()
            made = FakeService(self._loop, authority, labels or {})
            self._join(made)
            return made

    def grpc_service(self, authority: str, *, labels: Mapping[str, str] | None = None) -> FakeGrpcService:
        """`service`, for gRPC: what `mesh.grpc_channel(authority)` leads to."""
        with self._saying:
            if (known := self._known(authority, labels or {}, FakeGrpcService)) is not None:
                return known
            made = FakeGrpcService(authority, labels or {})
            self._join(made)
            return made

    def _known(self, authority: str, labels: Mapping[str, str], kind: type[K]) -> K | None:
        for each in self._services:
            if each.authority != authority:
                continue
            if not isinstance(each, kind):
                raise ValueError(f"{authority} is a {type(each).__name__} already: one service speaks one protocol")
            if each.labels == dict(labels):
                return each
        return None

    def _join(self, made: FakeService | FakeGrpcService) -> None:
        self._services.append(made)
        try:
            self._put_into_force(self._applied)
        except Exception:
            self._services.remove(made)
            made.close()
            self._put_into_force(self._applied)
            raise

    # What the mesh says

    def apply(self, configuration: str | os.PathLike[str]) -> None:
        """Put YAML into force: a text, or a path of a file or a folder (`pathlib.Path`). An object that was applied
        before is replaced.

        Kinds that say who serves what (ServiceEntry, Service, Endpoints, EndpointSlice, Pod) are left out: that is the
        test's word, so name the services first. Raises ConfigurationError for the first thing that is wrong, and
        leaves all as it was.
        """
        with self._saying:
            given = {each.key: each for each in self._applied}
            for text, source in _texts(configuration):
                parsed = parse_text(text, source, namespace=self.settings.namespace)
                if parsed.problems:
                    raise parsed.problems[0]
                for each in parsed.objects:
                    if not isinstance(each.spec, _WHO_SERVES_WHAT):
                        given[each.key] = each
            applied = tuple(given.values())
            self._put_into_force(applied, is_strict=True)
            self._applied = applied

    def _put_into_force(self, applied: tuple[r.Object, ...], is_strict: bool = False) -> None:
        says_itself = any(each.kind == "ConfigMap" for each in applied)
        objects = (*self._entries(says_itself), *applied)
        translation = translate(objects, (), self.node)
        if is_strict and translation.problems:
            raise translation.problems[0]
        self._version += 1
        self._feed.publish(replace(translation.snapshot, version=f"test-{self._version}"))

    def _entries(self, says_itself: bool) -> tuple[r.Object, ...]:
        items: list[dict[str, Any]] = [] if says_itself else [_REGISTRY_ONLY]
        by_authority: dict[str, list[FakeService | FakeGrpcService]] = {}
        for each in self._services:
            by_authority.setdefault(each.authority, []).append(each)
        for number, (authority, services) in enumerate(by_authority.items()):
            items.append(_service_entry(f"fake-{number}", authority, services, self.settings.namespace))
        parsed = parse_value({"apiVersion": "v1", "kind": "List", "items": items}, "this test")
        if parsed.problems:
            raise parsed.problems[0]
        return parsed.objects

    # What belongs to it

    @contextmanager
    def instrumented(self) -> Iterator[None]:
        """Meanwhile, clients that are made without a word of the mesh call through this one: `meshlib.instrument`."""
        from meshlib.instrumentation import instrument, uninstrument

        instrument(self)
        try:
            yield
        finally:
            uninstrument()

    def close(self) -> None:
        super().close()
        for each in self._services:
            each.close()
        self._services = []
        if self._loop is not None:
            self._loop.close()
            self._loop = None


def _service_entry(
    name: str, authority: str, services: Iterable[FakeService | FakeGrpcService], namespace: str
) -> dict[str, Any]:
    host, mark, port = authority.rpartition(":")
    if not mark:
        host, port = authority, "80"
    if not host or not port.isdigit():
        raise ValueError(f"a service is host:port, or a host alone; found {authority!r}")
    services = list(services)
    protocol = "GRPC" if isinstance(services[0], FakeGrpcService) else "HTTP"
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "hosts": [host],
            "ports": [{"number": int(port), "name": protocol.lower(), "protocol": protocol}],
            "resolution": "STATIC",
            "endpoints": [
                {"address": HOST, "ports": {protocol.lower(): each.address[1]}, "labels": each.labels}
                for each in services
            ],
        },
    }


def _texts(configuration: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Each YAML text, and what to call it. Raises OSError for a path that can't be read."""
    if isinstance(configuration, str):
        yield configuration, "this test"
        return
    path = Path(configuration)
    files = sorted(each for each in path.rglob("*") if each.suffix in (".yaml", ".yml")) if path.is_dir() else [path]
    for file in files:
        yield file.read_text(encoding="utf-8"), str(file)


class _Remember:
    """An Observer that writes down each call as it ends."""

    def __init__(self, calls: list[CallMade]) -> None:
        self._calls = calls

    def call_began(self, call: Call) -> None: ...

    def attempt_began(self, call: Call, attempt: Attempt) -> None: ...

    def attempt_ended(self, call: Call, attempt: Attempt) -> None: ...

    def call_ended(self, call: Call) -> None:
        request = call.request
        self._calls.append(
            CallMade(
                request.authority if request else "",
                request.method if request else "",
                request.path if request else "",
                call.status,
                call.flags,
                call.reason,
                call.attempts,
                call.grpc_status,
            )
        )

    def serving(self, served: Served) -> None: ...

    def served(self, served: Served) -> None: ...
