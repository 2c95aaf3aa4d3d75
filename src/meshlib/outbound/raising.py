"""What does a failed call raise? The client library's own exception, which is a MeshError as well.

So `except httpx.ConnectError` in code that was there before goes on working, and `except meshlib.MeshError` works for
every client. The exception that the library made stays the object it is, with its traceback and attributes; only its
class becomes one that has both parents. Such classes are made once for each pair.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

from meshlib.errors import (
    AnsweredByRoute,
    FaultInjected,
    MeshError,
    NoCluster,
    NoHealthyEndpoint,
    NoRoute,
    NotInRegistry,
    Overflow,
    RateLimited,
    RateLimitUnanswered,
    RequestRefused,
    UpstreamConnectionFailure,
    UpstreamFailure,
    UpstreamReset,
    UpstreamTimeout,
)
from meshlib.model import Endpoint
from meshlib.policy.retry import (
    CLIENT_TIMEOUT,
    CONNECT_FAILURE,
    LOCAL,
    REFUSED_STREAM,
    RESET,
    RESET_BEFORE_REQUEST,
    TIMEOUT,
)
from meshlib.policy.steps import Reply

E = TypeVar("E", bound=Exception)

_OF_FAILURE: dict[str, type[MeshError]] = {
    CONNECT_FAILURE: UpstreamConnectionFailure,
    REFUSED_STREAM: UpstreamReset,
    RESET_BEFORE_REQUEST: UpstreamReset,
    RESET: UpstreamReset,
    TIMEOUT: UpstreamTimeout,
    CLIENT_TIMEOUT: UpstreamTimeout,
    LOCAL: RequestRefused,
}
_OF_FLAG: dict[str, type[MeshError]] = {
    "UH": NoHealthyEndpoint,
    "NR": NoRoute,
    "NC": NoCluster,
    "UO": Overflow,
    "RL": RateLimited,
    "RLSE": RateLimitUnanswered,
    "FI": FaultInjected,
    "DI": FaultInjected,
    "UT": UpstreamTimeout,
    "UF": UpstreamConnectionFailure,
    "UC": UpstreamReset,
}

_made: dict[tuple[type[MeshError], type[Exception]], Any] = {}


def mixed(kind: type[MeshError], native: type[E]) -> type[E]:
    """The one class that is both. It has the native one's name, so that logs and error trackers group as before."""
    found = _made.get((kind, native))
    if found is None:
        body = {
            "__module__": native.__module__,
            "__qualname__": native.__qualname__,
            "__doc__": native.__doc__,
            "__str__": _told,
            "__reduce__": _reduced,
            "_parents": (kind, native),
        }
        found = _made.setdefault((kind, native), type(native.__name__, (kind, native), body))
    return found  # type: ignore[no-any-return]


def failed(error: E, failure: str, flag: str, reason: str, endpoint: Endpoint | None = None) -> E:
    """`error`, which from now on is a MeshError, too. failure: a name of policy/retry."""
    kind = _OF_FAILURE.get(failure, UpstreamFailure)
    return adopt(error, kind, flag, reason, "" if endpoint is None else endpoint.authority)


def like(error: E, cause: MeshError) -> E:
    """`error`, which from now on is the same kind of MeshError as `cause`, with what that one says."""
    parents: Any = getattr(type(cause), "_parents", None)
    kind: type[MeshError] = parents[0] if parents else type(cause)
    # urllib3's MaxRetryError has a `reason` of its own: the exception that it was raised for.
    reason = getattr(cause, "_mesh_reason", cause.reason)
    return adopt(error, kind, cause.flag, reason, cause.endpoint)


def adopt(error: E, kind: type[MeshError], flag: str, reason: str, endpoint: str) -> E:
    """`error` as a `kind`, too: the same object, or its equal where the object can't change (builtin classes).

    One that is a MeshError already stays as it is: a call inside the call has said what happened.
    """
    if isinstance(error, MeshError):
        return error
    native = type(error)
    try:
        error.__class__ = mixed(kind, native)
    except TypeError:
        try:
            error = _equal(mixed(kind, native), error)
        except TypeError:  # a class that can't be subclassed, or whose instances can't be made
            return error
    facts: Any = error
    facts._mesh_reason = reason
    facts.flag, facts.endpoint = flag, endpoint
    if "reason" not in vars(error):
        facts.reason = reason
    return error


def _equal(kind: type[E], error: E) -> E:
    made = kind.__new__(kind, *error.args)
    made.args = error.args
    made.__dict__.update(getattr(error, "__dict__", {}))
    made.__cause__, made.__context__ = error, error.__context__
    return made.with_traceback(error.__traceback__)


def answered(reply: Reply, also: Callable[[type[MeshError]], type[Exception] | None] = lambda kind: None) -> Exception:
    """The exception for an answer of the mesh, for callers that can't be given a response. also: what else the
    exception is to be, by its kind."""
    kind: type[MeshError] | None = getattr(reply, "error", None) or _OF_FLAG.get(reply.flag.partition(",")[0])
    if kind is None:
        kind = NotInRegistry if reply.status == 502 else AnsweredByRoute
    words = reply.reason or f"answered with {reply.status}"
    error: Any
    if (native := also(kind)) is not None:
        error = mixed(kind, native)(words)
    else:
        error = kind(f"{words} [{reply.flag}]" if reply.flag else words)
    error.status, error.flag, error.reason = reply.status, reply.flag, reply.reason
    return cast(Exception, error)


def _told(self: Any) -> str:
    words: str = self._parents[1].__str__(self)
    reason, flag = getattr(self, "_mesh_reason", ""), self.flag
    if reason:
        words = f"{words}: {reason}"
    return f"{words} [{flag}]" if flag else words


def _reduced(self: Any) -> tuple[Any, ...]:
    # Not by the native class's own __reduce__, which calls a constructor, and each has another form.
    state = {name: _portable(value) for name, value in self.__dict__.items()}
    if isinstance(self, OSError) and self.errno is not None:  # these live outside of __dict__
        state.update(errno=self.errno, strerror=_portable(self.strerror))
    return _revived, (*self._parents, tuple(map(_portable, self.args)), state)


def _revived(kind: type[MeshError], native: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    made = mixed(kind, native)
    error = made.__new__(made, *args)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


def _portable(value: Any) -> Any:
    """What other processes can be told of a value: connections, pools and TLS contexts stay where they are."""
    try:
        pickle.dumps(value)
        return value
    except Exception:
        if isinstance(value, tuple):
            parts = [_portable(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return None
