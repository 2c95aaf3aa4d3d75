"""What does a test say about a service, and what does it ask afterwards? FakeService, FakeGrpcService.

What is said with `times` comes first, in the order in which it is said; what is said without holds otherwise, the last
of it. So `fails(503, times=2).responds(json=[])` fails twice and answers from then on.
"""

from __future__ import annotations

import json as json_library
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

from meshlib.testing.http import HttpEndpoint, LoopThread
from meshlib.testing.script import RESET, Answer, Received, Response, Script

if TYPE_CHECKING:
    import grpc

_NOTHING: Any = object()


class _Endpoint(Protocol):
    port: int

    def up(self) -> None: ...
    def down(self) -> None: ...
    def close(self) -> None: ...


class _Fake:
    """What both kinds have."""

    _endpoint: _Endpoint

    def __init__(self, authority: str, labels: Mapping[str, str], answer: Answer) -> None:
        self.authority, self.labels = authority, dict(labels)
        self.received: list[Received] = []
        """Requests in the order in which they came; each try of a call is one, also those that were reset."""
        self._script = Script(answer)

    @property
    def address(self) -> tuple[str, int]:
        """Where it really is."""
        return "127.0.0.1", self._endpoint.port

    def delays(self, seconds: float, *, times: int | None = None) -> Self:
        """Wait so long before whatever the answer is. Delays have an order of their own beside the answers'."""
        self._script.delay(seconds, times)
        return self

    def is_down(self) -> Self:
        """From now on connections are refused, and those that exist are ended. `is_up` is the way back."""
        self._endpoint.down()
        return self

    def is_up(self) -> Self:
        """Connections are taken, as in the beginning."""
        self._endpoint.up()
        return self

    def close(self) -> None:
        self._endpoint.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.authority} {len(self.received)} received>"


class FakeService(_Fake):
    """A service over HTTP/1.1, on a port of loopback. Answers 200 without a body until it is told otherwise."""

    def __init__(self, thread: LoopThread, authority: str, labels: Mapping[str, str]) -> None:
        super().__init__(authority, labels, lambda _: Response())
        self._endpoint = HttpEndpoint(thread, self._script, self.received.append)

    def responds(
        self,
        status: int = 200,
        *,
        json: Any = _NOTHING,
        body: str | bytes = b"",
        headers: Mapping[str, str] | None = None,
        times: int | None = None,
    ) -> Self:
        """json: the body, with its content type; else body, text as UTF-8. Raises ValueError for a status that ends no
        exchange (below 200)."""
        if not 200 <= status <= 999:
            raise ValueError(f"an answer's status is 200 to 999; found {status}")
        said = dict(headers or {})
        data = body.encode() if isinstance(body, str) else body
        if json is not _NOTHING:
            data = json_library.dumps(json).encode()
            said.setdefault("content-type", "application/json")
        response = Response(status, data, said)
        return self.answers(lambda _: response, times=times)

    def fails(self, status: int = 503, *, times: int | None = None) -> Self:
        """Answer with this status and no body."""
        return self.responds(status, times=times)

    def resets(self, *, times: int | None = None) -> Self:
        """Reset the connection once the request has been read."""
        return self.answers(lambda _: RESET, times=times)

    def answers(self, answer: Callable[[Received], Any], *, times: int | None = None) -> Self:
        """What `answer` makes of each request: a Response. It is called on the loop of all fake services, so it must
        not block. What it raises is answered with 500 and the exception's text."""
        self._script.answer(answer, times)
        return self


class FakeGrpcService(_Fake):
    """A gRPC service that takes any method, on a port of loopback. Answers with one empty message until it is told
    otherwise."""

    def __init__(self, authority: str, labels: Mapping[str, str]) -> None:
        from meshlib.testing.rpc import GrpcEndpoint

        super().__init__(authority, labels, lambda _: (b"",))
        self._endpoint = GrpcEndpoint(self._script, self.received.append)

    def responds(self, *messages: Any, times: int | None = None) -> Self:
        """With these, protobuf messages or bytes: one for a unary method, any number for a stream."""
        return self.answers(lambda _: messages, times=times)

    def fails(self, code: grpc.StatusCode | None = None, details: str = "as told", *, times: int | None = None) -> Self:
        """Answer with this status; default UNAVAILABLE."""
        import grpc

        from meshlib.testing.rpc import Status

        status = Status(code or grpc.StatusCode.UNAVAILABLE, details)
        self._script.answer(lambda _: status, times)
        return self

    def answers(self, answer: Callable[[Received], Any], *, times: int | None = None) -> Self:
        """The messages that `answer` makes of each request: one, or a sequence of them."""

        def messages(received: Received) -> tuple[bytes, ...]:
            found = answer(received)
            several = found if isinstance(found, list | tuple) else (found,)
            return tuple(each if isinstance(each, bytes) else each.SerializeToString() for each in several)

        self._script.answer(messages, times)
        return self
