"""What a failed call raises is the client library's own exception and a MeshError: one object, two parents."""

from __future__ import annotations

import copy
import inspect
import pickle
import ssl
import subprocess
import sys
from collections.abc import Callable

import aiohttp
import httpx
import httpx2
import pytest
import requests
import urllib3
from aiohttp.client_reqrep import ConnectionKey
from urllib3 import exceptions

import meshlib
from meshlib import errors
from meshlib.model import Endpoint
from meshlib.outbound.raising import adopt, answered, failed, like, mixed
from meshlib.policy import retry
from meshlib.policy.steps import Reply

WHERE = Endpoint("10.0.0.1", 9080)
KEY = ConnectionKey("reviews", 9080, False, True, None, None, None)
# Each of another build: own constructors, OSError underneath, slots in C, exceptions inside exceptions.
NATIVE: list[Callable[[], Exception]] = [
    lambda: httpx.ConnectError("refused", request=httpx.Request("GET", "http://reviews/")),
    lambda: httpx2.ReadTimeout("late"),
    lambda: requests.ConnectionError("refused", request=requests.Request("GET", "http://reviews/").prepare()),
    lambda: requests.ReadTimeout("late"),
    lambda: requests.exceptions.ChunkedEncodingError(exceptions.ProtocolError("cut", OSError(104, "reset"))),
    lambda: exceptions.MaxRetryError(None, "/", ValueError("why")),  # type: ignore[arg-type]
    lambda: exceptions.NewConnectionError(None, "refused"),  # type: ignore[arg-type]
    lambda: exceptions.ReadTimeoutError(urllib3.HTTPConnectionPool("reviews"), "/", "late"),
    lambda: exceptions.IncompleteRead(1, 2),
    lambda: aiohttp.ClientConnectorError(KEY, ConnectionRefusedError(111, "refused")),
    lambda: aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("unknown authority")),
    lambda: aiohttp.ServerDisconnectedError(),
    lambda: aiohttp.SocketTimeoutError("late"),
    lambda: aiohttp.ClientPayloadError("cut"),
    lambda: ValueError("builtin"),
    lambda: ConnectionResetError(104, "reset"),
    lambda: TimeoutError("late"),
]


@pytest.fixture(params=NATIVE, ids=lambda make: type(make()).__name__)
def native(request: pytest.FixtureRequest) -> Exception:
    made: Exception = request.param()
    return made


def test_the_exception_stays_what_it_was_and_is_a_mesh_error_too(native: Exception) -> None:
    """Its class keeps its name, so that logs and error trackers group as before."""
    kind, words = type(native), str(native)
    error = failed(native, retry.RESET, "UC,URX", "reviews at 10.0.0.1:9080", WHERE)
    assert isinstance(error, kind) and isinstance(error, meshlib.UpstreamReset)
    assert (error is native) == (kind.__module__ != "builtins")  # the classes of builtins can't be changed
    assert (type(error).__name__, type(error).__module__) == (kind.__name__, kind.__module__)
    assert (error.flag, error.endpoint, error.status, error.grpc_status) == ("UC,URX", "10.0.0.1:9080", 503, 14)
    assert str(error) == f"{words}: reviews at 10.0.0.1:9080 [UC,URX]"


def test_it_survives_pickling_and_copying(native: Exception) -> None:
    """With all that can be told elsewhere; pools and connections stay."""
    error = failed(native, retry.CONNECT_FAILURE, "UF", "reviews", WHERE)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.flag, twin.endpoint) == (str(error), "UF", "10.0.0.1:9080")  # type: ignore[attr-defined]


def test_what_can_not_be_sent_stays_behind() -> None:
    """A TLS context in an exception must not make the exception itself unsendable."""
    context = ssl.create_default_context()
    key = ConnectionKey("reviews", 443, True, context, None, None, None)
    error = failed(aiohttp.ClientConnectorError(key, OSError(1, "no")), retry.CONNECT_FAILURE, "UF", "reviews")
    twin = pickle.loads(pickle.dumps(error))
    assert (twin.host, twin.port, twin.ssl) == ("reviews", 443, None)
    assert "reviews" in str(twin)


def test_a_class_is_made_once() -> None:
    """Error trackers and tests compare classes; memory does not grow with errors."""
    assert mixed(meshlib.UpstreamReset, httpx.ReadError) is mixed(meshlib.UpstreamReset, httpx.ReadError)
    assert mixed(meshlib.UpstreamReset, httpx.ReadError) is not mixed(meshlib.UpstreamTimeout, httpx.ReadError)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (retry.CONNECT_FAILURE, meshlib.UpstreamConnectionFailure),
        (retry.REFUSED_STREAM, meshlib.UpstreamReset),
        (retry.RESET_BEFORE_REQUEST, meshlib.UpstreamReset),
        (retry.RESET, meshlib.UpstreamReset),
        (retry.TIMEOUT, meshlib.UpstreamTimeout),
        (retry.CLIENT_TIMEOUT, meshlib.UpstreamTimeout),
        (retry.LOCAL, meshlib.RequestRefused),
    ],
)
def test_each_failure_has_its_class(failure: str, kind: type[meshlib.MeshError]) -> None:
    """One for each thing that a caller would handle differently."""
    assert isinstance(failed(httpx.TransportError("x"), failure, "", ""), kind)


def test_a_mesh_error_is_not_made_one_again() -> None:
    """A call inside the call has said what happened, and where."""
    inner = failed(httpx.ConnectError("refused"), retry.CONNECT_FAILURE, "UF", "ratings", WHERE)
    assert adopt(inner, meshlib.UpstreamFailure, "UC", "reviews", "") is inner
    assert (type(inner).__mro__[1], inner.flag) == (meshlib.UpstreamConnectionFailure, "UF")  # type: ignore[attr-defined]


def test_an_exception_around_another_says_the_same() -> None:
    """requests wraps urllib3's; urllib3's MaxRetryError has a `reason` of its own, which stays."""
    inner = failed(exceptions.ReadTimeoutError(None, "/", "late"), retry.CLIENT_TIMEOUT, "DC", "reviews", WHERE)  # type: ignore[arg-type]
    assert isinstance(inner, meshlib.MeshError)
    outer = like(exceptions.MaxRetryError(None, "/", inner), inner)  # type: ignore[arg-type]
    assert isinstance(outer, meshlib.UpstreamTimeout)
    assert outer.reason is inner
    outermost = like(requests.ReadTimeout(outer), outer)
    assert isinstance(outermost, meshlib.UpstreamTimeout)
    assert (outermost.reason, outermost.flag, outermost.endpoint) == ("reviews", "DC", "10.0.0.1:9080")


@pytest.mark.parametrize(
    ("status", "flag", "kind"),
    [
        (503, "UH", meshlib.NoHealthyEndpoint),
        (404, "NR", meshlib.NoRoute),
        (503, "NC", meshlib.NoCluster),
        (503, "UO", meshlib.Overflow),
        (429, "RL", meshlib.RateLimited),
        (418, "FI", meshlib.FaultInjected),
        (504, "UT", meshlib.UpstreamTimeout),
        (502, "", meshlib.NotInRegistry),
        (301, "", meshlib.AnsweredByRoute),
    ],
)
def test_each_answer_of_the_mesh_has_its_class(status: int, flag: str, kind: type[meshlib.MeshError]) -> None:
    """For callers that can't be given a response."""
    error = answered(Reply(status, flag=flag, reason="reviews: so it is"))
    assert type(error) is kind
    assert (error.status, error.flag, error.reason) == (status, flag, "reviews: so it is")
    assert str(error) == "reviews: so it is" + (f" [{flag}]" if flag else "")
    both = answered(Reply(status, flag=flag, reason="reviews: so it is"), lambda kind: TimeoutError)
    assert isinstance(both, kind) and isinstance(both, TimeoutError)
    assert str(both) == str(error)


def test_the_whole_tree_is_public() -> None:
    """What can be raised can be caught by a name that is promised; what only the wire knows is not raised at users."""
    tree = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, meshlib.MeshError)}
    assert tree - set(meshlib.__all__) == {"InvalidResource"}
    for name in tree - {"InvalidResource"}:
        kind = getattr(meshlib, name)
        assert (kind.__doc__, 400 <= kind.status < 600, 1 <= kind.grpc_status <= 16) == (kind.__doc__, True, True)


def test_importing_meshlib_imports_no_client_library() -> None:
    """A service that uses none of them needs none of them."""
    code = (
        "import sys, meshlib; meshlib.MeshError, meshlib.connect;"
        "print([m for m in ('httpx', 'requests', 'urllib3', 'aiohttp', 'pybreaker', 'grpc') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
