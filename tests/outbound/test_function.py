"""A function under @mesh.outbound: what the destination's rules do to it, whatever kind of function it is."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import requests

import meshlib
from meshlib.mesh import Mesh
from meshlib.model import (
    Cluster,
    ConnectionLimits,
    DirectResponse,
    Fault,
    FaultAbort,
    RetryPolicy,
    RouteMatch,
    StringMatch,
)
from meshlib.outbound import function as module
from meshlib.policy import propagation
from peers import refusing_port
from snapshots import forward, mesh, publish, route, service, snapshot

ELSEWHERE = [("127.0.0.1", 9)]
AT_ONCE = RetryPolicy(attempts=2, on=frozenset({"5xx"}), base_interval=0.0001, max_interval=0.0001)


@pytest.fixture
def here() -> Iterator[Mesh]:
    made = mesh()
    yield made
    made.close()


class Failing:
    """Fails so many times, then returns. Counts."""

    def __init__(self, times: int, error: Callable[[], Exception] = lambda: ConnectionResetError("gone")) -> None:
        self.left, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise self.error()
        return "done"


def sync(work: Failing) -> Callable[[], str]:
    def run() -> str:
        return work()

    return run


def coroutine(work: Failing) -> Callable[[], Any]:
    async def run() -> str:
        await asyncio.sleep(0)
        return work()

    return run


def generator(work: Failing) -> Callable[[], Any]:
    def run() -> Iterator[str]:
        yield work()

    return run


def async_generator(work: Failing) -> Callable[[], Any]:
    async def run() -> AsyncIterator[str]:
        await asyncio.sleep(0)
        yield work()

    return run


KINDS = [sync, coroutine, generator, async_generator]


def finish(made: Any) -> Any:
    """What a call of any kind comes to."""
    if inspect.isawaitable(made):
        return asyncio.run(_awaited(made))
    if hasattr(made, "__anext__"):
        return asyncio.run(_first(made))
    return next(made) if inspect.isgenerator(made) else made


async def _awaited(made: Any) -> Any:
    return await made


async def _first(made: Any) -> Any:
    try:
        return await anext(made)
    finally:
        await made.aclose()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_decorated_function_is_of_the_same_kind(here: Mesh, kind: Any) -> None:
    """Frameworks look: an endpoint that is a coroutine function is awaited."""
    plain = kind(Failing(0))
    wrapped = here.outbound("ratings")(plain)
    for question in (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction):
        assert question(wrapped) == question(plain)
    assert (wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__) == (plain.__name__, plain.__doc__, plain)


def test_the_result_comes_back(here: Mesh, kind: Any) -> None:
    """Once, and nothing is counted as in flight after it."""
    publish(here, service("ratings:80", ELSEWHERE))
    work = Failing(0)
    assert finish(here.outbound("ratings")(kind(work))()) == "done"
    assert work.calls == 1
    assert here.live.clusters["ratings:80"].state.requests == 0


def test_a_failure_is_tried_again_when_that_is_harmless(here: Mesh, kind: Any) -> None:
    """`idempotent=True`, and the route retries."""
    publish(here, service("ratings:80", ELSEWHERE, retry=AT_ONCE))
    work = Failing(2)
    assert finish(here.outbound("ratings", idempotent=True)(kind(work))()) == "done"
    assert work.calls == 3


def test_a_failure_that_may_have_been_seen_is_not_tried_again(here: Mesh, kind: Any) -> None:
    """Unless its author says that it may be; what could not connect is, always."""
    publish(here, service("ratings:80", ELSEWHERE, retry=AT_ONCE))
    work = Failing(1)
    with pytest.raises(ConnectionResetError):
        finish(here.outbound("ratings")(kind(work))())
    assert work.calls == 1
    work = Failing(2, ConnectionRefusedError)
    assert finish(here.outbound("ratings")(kind(work))()) == "done"


def test_what_is_raised_is_both_the_functions_own_and_the_meshs(here: Mesh, kind: Any) -> None:
    """An exception of a library stays the very object; a builtin one can't change, so its equal is raised."""

    class OutOfOrder(Exception):
        pass

    own = OutOfOrder("closed for today")
    publish(here, service("ratings:80", ELSEWHERE))
    with pytest.raises(OutOfOrder) as caught:
        finish(here.outbound("ratings")(kind(Failing(9, lambda: own)))())
    assert caught.value is own
    assert isinstance(own, meshlib.UpstreamFailure)
    assert str(own).startswith("closed for today: ratings")

    with pytest.raises(ValueError, match="not a number") as told:
        finish(here.outbound("ratings")(kind(Failing(9, lambda: ValueError("not a number"))))())
    assert isinstance(told.value, meshlib.MeshError)
    copy = pickle.loads(pickle.dumps(told.value))
    assert isinstance(copy, ValueError) and isinstance(copy, meshlib.UpstreamFailure)


def test_an_exception_that_is_no_failure_passes_as_it_is(here: Mesh, kind: Any) -> None:
    """It is an answer: not tried again, no fallback, no MeshError."""
    publish(here, service("ratings:80", ELSEWHERE, retry=AT_ONCE))
    work = Failing(1, lambda: KeyError("no such product"))
    wrapped = here.outbound("ratings", failures=OSError, idempotent=True, fallback=lambda: "never")(kind(work))
    with pytest.raises(KeyError) as caught:
        finish(wrapped())
    assert not isinstance(caught.value, meshlib.MeshError)
    assert work.calls == 1


def test_a_fallback_answers_when_the_call_is_given_up(here: Mesh) -> None:
    """With the call's arguments; in the function's own kind, or plainly."""
    publish(here, service("ratings:80", ELSEWHERE))
    seen: list[Any] = []

    def instead(*args: Any, **named: Any) -> list[int]:
        seen.append((args, named))
        return [0]

    def broken(product: int, *, stars: int) -> list[int]:
        raise ConnectionResetError

    async def broken_too(product: int, *, stars: int) -> list[int]:
        raise ConnectionResetError

    async def instead_too(*args: Any, **named: Any) -> list[int]:
        return instead(*args, **named)

    def broken_stream(product: int, *, stars: int) -> Iterator[int]:
        raise ConnectionResetError
        yield 1

    async def broken_async_stream(product: int, *, stars: int) -> AsyncIterator[int]:
        raise ConnectionResetError
        yield 1

    assert here.outbound("ratings", fallback=instead)(broken)(1, stars=5) == [0]
    assert asyncio.run(_awaited(here.outbound("ratings", fallback=instead)(broken_too)(1, stars=5))) == [0]
    assert asyncio.run(_awaited(here.outbound("ratings", fallback=instead_too)(broken_too)(1, stars=5))) == [0]
    assert list(here.outbound("ratings", fallback=instead)(broken_stream)(1, stars=5)) == [0]
    assert asyncio.run(_first(here.outbound("ratings", fallback=instead)(broken_async_stream)(1, stars=5))) == 0
    assert seen == [((1,), {"stars": 5})] * 5


def test_the_meshs_own_answers_are_exceptions_by_their_reason(here: Mesh, kind: Any) -> None:
    """There is no response to give; what the caller would do differently has a class of its own."""
    broken = Fault(abort=FaultAbort(1_000_000, 503))
    routes = {
        "faulty:80": [route(forward("c"), fault=broken)],
        "fixed:80": [route(DirectResponse(203, b"fixed"))],
        "nowhere:80": [route(forward("c"), RouteMatch(path=StringMatch("exact", "/elsewhere")))],
        "full:80": [route(forward("d"))],
    }
    full = Cluster("d", limits=ConnectionLimits(max_requests=0))
    publish(here, snapshot(routes, {"c": ELSEWHERE, "d": (full, ELSEWHERE)}))
    work = Failing(0)
    for name, expected, flag in (
        ("faulty", meshlib.FaultInjected, "FI"),
        ("fixed", meshlib.AnsweredByRoute, ""),
        ("nowhere", meshlib.NoRoute, "NR"),
        ("full", meshlib.Overflow, "UO"),
    ):
        with pytest.raises(expected) as caught:
            finish(here.outbound(name)(kind(work))())
        assert isinstance(caught.value, meshlib.MeshError)
        assert caught.value.flag == flag
        if flag:
            assert finish(here.outbound(name, fallback=sync(Failing(0)))(sync(work))()) == "done"
    assert work.calls == 0
    assert finish(here.outbound("nowhere", path="/elsewhere")(kind(work))()) == "done"


def test_a_result_with_a_status_code_is_judged_by_it(here: Mesh) -> None:
    """Responses of libraries that the mesh does not know: 503 is tried again, closed first; 404 is an answer."""
    publish(here, service("ratings:80", ELSEWHERE, retry=AT_ONCE))
    closed: list[int] = []

    class Response:
        def __init__(self, status_code: int) -> None:
            self.status_code = status_code

        def close(self) -> None:
            closed.append(self.status_code)

    answers = iter([503, 502, 200])
    wrapped = here.outbound("ratings", idempotent=True)(lambda: Response(next(answers)))
    assert wrapped().status_code == 200
    assert closed == [503, 502]
    assert here.outbound("ratings", idempotent=True)(lambda: Response(404))().status_code == 404
    assert here.outbound("ratings", idempotent=True)(lambda: Response(503))().status_code == 503
    assert here.outbound("ratings", fallback=lambda: "cached")(lambda: Response(503))() == "cached"


def test_libraries_exceptions_are_read_as_what_they_mean(here: Mesh) -> None:
    """Statuses in raise_for_status(), gRPC codes, and the many names of "no connection"."""
    request = httpx.Request("GET", "http://ratings/")

    class Unavailable(Exception):
        """As grpc.RpcError, whose code is an enum of (number, name)."""

        def code(self) -> Any:
            return type("Code", (), {"value": (14, "unavailable")})()

    by_status = RetryPolicy(attempts=1, on=frozenset({"unavailable"}), status_codes=frozenset({429}))
    publish(here, service("ratings:80", ELSEWHERE, retry=by_status))
    refused = requests.ConnectionError(type("MaxRetryError", (Exception,), {"reason": ConnectionRefusedError()})())
    for error, calls in (
        (httpx.HTTPStatusError("", request=request, response=httpx.Response(429)), 2),
        (httpx.HTTPStatusError("", request=request, response=httpx.Response(500)), 1),
        (Unavailable(), 2),
        (httpx.ReadError("reset"), 1),
    ):
        work = Failing(9, lambda error=error: error)  # type: ignore[misc]
        with pytest.raises(type(error)):
            here.outbound("ratings", idempotent=True)(sync(work))()
        assert work.calls == calls, error
    publish(here, service("ratings:80", ELSEWHERE, retry=RetryPolicy(attempts=1, on=frozenset({"connect-failure"}))))
    for error in (httpx.ConnectTimeout("late"), ConnectionRefusedError(), refused):
        work = Failing(9, lambda error=error: error)  # type: ignore[misc]
        with pytest.raises(meshlib.UpstreamConnectionFailure):
            here.outbound("ratings")(sync(work))()
        assert work.calls == 2, error


async def test_a_coroutine_is_cancelled_when_its_time_is_up(here: Mesh) -> None:
    """And the exception is a TimeoutError, too."""
    publish(here, service("ratings:80", ELSEWHERE, timeout=0.05))
    ended: list[str] = []

    @here.outbound("ratings")
    async def stalls() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    with pytest.raises(meshlib.UpstreamTimeout, match=r"\[UT\]") as caught:
        await stalls()
    assert isinstance(caught.value, TimeoutError)
    assert ended == ["cancelled"]

    @here.outbound("ratings")
    async def stalls_later() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(30)

    items = stalls_later()
    assert await anext(items) == 1
    with pytest.raises(meshlib.UpstreamTimeout):
        await anext(items)


async def test_each_try_has_its_own_time(here: Mesh) -> None:
    """perTryTimeout: the first try stalls, the second answers."""
    policy = RetryPolicy(attempts=1, on=frozenset({"5xx"}), per_try_timeout=0.05)
    publish(here, service("ratings:80", ELSEWHERE, timeout=20.0, retry=policy))
    tries: list[int] = []

    @here.outbound("ratings", idempotent=True)
    async def get_ratings() -> str:
        tries.append(len(tries))
        if len(tries) == 1:
            await asyncio.sleep(30)
        return "done"

    assert await get_ratings() == "done"
    assert tries == [0, 1]


async def test_a_cancelled_call_is_neither_failure_nor_tried_again(here: Mesh) -> None:
    """CancelledError passes at once, and all that was counted is given back."""
    publish(here, service("ratings:80", ELSEWHERE, retry=AT_ONCE))
    begun = asyncio.Event()
    calls: list[int] = []

    @here.outbound("ratings", idempotent=True, fallback=lambda: "never")
    async def stalls() -> None:
        calls.append(1)
        begun.set()
        await asyncio.sleep(30)

    task = asyncio.create_task(stalls())
    await begun.wait()
    assert here.live.clusters["ratings:80"].state.requests == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == [1]
    assert here.live.clusters["ratings:80"].state.requests == 0


def test_a_sync_function_is_not_tried_again_after_its_time(here: Mesh) -> None:
    """Nothing can interrupt it; a result that is late is a result."""
    publish(here, service("ratings:80", ELSEWHERE, timeout=0.02, retry=AT_ONCE))
    calls: list[int] = []

    @here.outbound("ratings", idempotent=True)
    def slow() -> str:
        calls.append(1)
        time.sleep(0.03)
        if len(calls) == 1:
            raise ConnectionResetError
        return "late"

    with pytest.raises(ConnectionResetError):
        slow()
    assert slow() == "late"
    assert len(calls) == 2


def test_meshed_calls_inside_inherit_the_time(here: Mesh) -> None:
    """So a sync function that calls by a client of the mesh ends in time after all."""
    publish(here, service("ratings:80", ELSEWHERE, timeout=5.0))
    seen: list[float | None] = []

    @here.outbound("ratings")
    def get_ratings() -> None:
        carried = propagation.current.get()
        seen.append(carried.remaining_time() if carried else None)

    get_ratings()
    assert seen[0] is not None and 4 < seen[0] <= 5
    assert propagation.current.get() is None


def test_a_stream_is_not_begun_anew_once_it_has_given_something(here: Mesh) -> None:
    """The caller has seen a part; the failure is his to know."""
    publish(here, service("ratings:80", ELSEWHERE, retry=AT_ONCE))
    begun: list[int] = []

    @here.outbound("ratings", idempotent=True, fallback=lambda: ["never"])
    def breaks_off() -> Iterator[int]:
        begun.append(1)
        yield 1
        raise ConnectionResetError("in the middle")

    items = breaks_off()
    assert begun == []  # as any generator, it starts when it is asked
    assert next(items) == 1
    assert here.live.clusters["ratings:80"].state.requests == 1
    with pytest.raises(ConnectionResetError, match="in the middle") as caught:
        next(items)
    assert isinstance(caught.value, meshlib.UpstreamFailure)
    assert begun == [1]
    assert here.live.clusters["ratings:80"].state.requests == 0


def test_a_generator_takes_and_returns_what_it_always_did(here: Mesh) -> None:
    """send, throw, close and the return value reach the function through the decorator."""
    publish(here, service("ratings:80", ELSEWHERE))
    closed: list[str] = []

    @here.outbound("ratings")
    def talk() -> Any:
        try:
            heard = yield "first"
            try:
                yield f"heard {heard}"
            except KeyError as error:
                yield f"caught {error}"
            return "end"
        finally:
            closed.append("closed")

    def whole() -> Any:
        return (yield from talk())

    speaker = whole()
    assert next(speaker) == "first"
    assert speaker.send("hello") == "heard hello"
    assert speaker.throw(KeyError("k")) == "caught 'k'"
    with pytest.raises(StopIteration) as ended:
        next(speaker)
    assert ended.value.value == "end"
    left = talk()
    next(left)
    left.close()
    assert closed == ["closed"] * 2
    assert here.live.clusters["ratings:80"].state.requests == 0

    @here.outbound("ratings")
    def nothing() -> Iterator[int]:
        return
        yield 1

    assert list(nothing()) == []


def test_limits_count_functions_as_calls(here: Mesh) -> None:
    """Two at once where one is allowed: the second overflows."""
    limited = Cluster("c", limits=ConnectionLimits(max_requests=1))
    publish(here, service("ratings:80", ELSEWHERE, cluster=limited))
    inside, leave = threading.Event(), threading.Event()

    @here.outbound("ratings")
    def hold() -> str:
        inside.set()
        assert leave.wait(10)
        return "held"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(hold)
        try:
            assert inside.wait(10)
            with pytest.raises(meshlib.Overflow, match=r"\[UO\]"):
                hold()
        finally:
            leave.set()
        assert first.result(10) == "held"
    assert hold() == "held"


def test_methods_partials_and_callable_objects_are_functions(here: Mesh) -> None:
    """Whatever can be called."""
    publish(here, service("ratings:80", ELSEWHERE))

    class Ratings:
        stars = 5

        @here.outbound("ratings")
        def get(self, product: int) -> tuple[int, int]:
            return product, self.stars

        async def __call__(self) -> int:
            return self.stars

    async def add(one: int, two: int) -> int:
        return one + two

    assert Ratings().get(7) == (7, 5)
    called = here.outbound("ratings")(Ratings())
    assert inspect.iscoroutinefunction(called)
    assert finish(called()) == 5
    assert finish(here.outbound("ratings")(functools.partial(add, 1))(2)) == 3


def test_a_destination_that_the_mesh_does_not_know_is_reported_once(
    here: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    """A forgotten port would otherwise switch every rule off in silence."""
    module._told.clear()
    publish(here, service("ratings:9080", ELSEWHERE))
    wrapped = here.outbound("ratings")(sync(Failing(0)))
    with caplog.at_level(logging.WARNING, "meshlib"):
        assert wrapped() == wrapped() == "done"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'ratings'" in caplog.text


@pytest.mark.parametrize("wrong", ["", "http://ratings", "ratings/0", "a b"])
def test_a_destination_is_a_name(here: Mesh, wrong: str) -> None:
    """Told where it is written, not where it is called."""
    with pytest.raises(meshlib.SettingsError):
        here.outbound(wrong)


def test_a_call_inside_the_call_says_by_itself_what_happened(here: Mesh) -> None:
    """A meshed client under the decorator: its error passes with its own reason and endpoint."""
    closed = ("127.0.0.1", refusing_port())
    publish(here, service("ratings:80", [closed]))

    @here.outbound("ratings")
    def get_ratings() -> None:
        with here.Client() as client:
            client.get("http://ratings/")

    with pytest.raises(httpx.ConnectError) as caught:
        get_ratings()
    assert isinstance(caught.value, meshlib.UpstreamConnectionFailure)
    assert caught.value.endpoint == f"127.0.0.1:{closed[1]}"


def test_a_function_finds_its_own_way_where_the_mesh_knows_no_endpoint(here: Mesh) -> None:
    """A database's host, say: the rules of the destination hold, nobody is picked."""
    publish(here, service("ratings:80", [], retry=AT_ONCE))
    work = Failing(1)
    assert here.outbound("ratings", idempotent=True)(lambda: work())() == "done"
    assert work.calls == 2
