"""What went wrong between us and a Kubernetes API server? One class per thing that a caller does something about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class KubernetesError(Exception):
    """Root of the tree: the API server said no. status: HTTP's. reason: Kubernetes' word for it (`AlreadyExists`)."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.retry_after = status, reason, retry_after


class InvalidSettings(KubernetesError):
    """The kubeconfig, or what a pod finds mounted, can't be used."""


class Unreachable(KubernetesError):
    """No answer: connection refused or reset, TLS failed, time ran out."""


class Unauthorized(KubernetesError):
    """401: the token is missing, expired or unknown."""


class Forbidden(KubernetesError):
    """403: RBAC does not allow it."""


class NotFound(KubernetesError):
    """404: no such object, or no such resource as long as its CRD is not installed."""


class Conflict(KubernetesError):
    """409: the object has changed since it was read, exists already, or another manager owns a field."""


class Gone(KubernetesError):
    """410: the resourceVersion or `continue` token is older than what the server remembers."""


class Invalid(KubernetesError):
    """422 and 400: the server does not take the object."""


class Busy(KubernetesError):
    """429 and 5xx: later. retry_after: seconds that the server asks for, if it does."""


_BY_STATUS: Mapping[int, type[KubernetesError]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: Busy,
}


def error_of(status: int, body: Any, where: str, retry_after: str = "") -> KubernetesError:
    """The error that an answer stands for. body: a `Status` object where the server sent one. where: what was asked."""
    given = body if isinstance(body, dict) else {}
    message, reason = str(given.get("message") or ""), str(given.get("reason") or "")
    details = given.get("details")
    causes = (details.get("causes") if isinstance(details, dict) else None) or ()
    kind = Busy if status >= 500 else _BY_STATUS.get(status, KubernetesError)
    if any(isinstance(cause, dict) and cause.get("reason") == "ResourceVersionTooLarge" for cause in causes):
        kind = Gone  # the server was restored from a backup: what we know lies in its future
    seconds = float(retry_after) if retry_after.isdecimal() else None
    text = f"{where}: {status} {message or reason or 'no reason given'}"
    return kind(text, status=status, reason=reason, retry_after=seconds)
