"""What of a request's path must not be written down? Values of parameters that are credentials by their name.

OpenTelemetry's semantic conventions ask for it of `url.query`; an access log is read by more people than the request
was meant for.
"""

from __future__ import annotations

import re

REDACTED = "REDACTED"
_CREDENTIAL = re.compile(
    r"(?i)(?P<name>(?:^|[?&;])"
    r"(?:access[_-]?token|id[_-]?token|refresh[_-]?token|token|auth|jwt|api[_-]?key|apikey|key|password|passwd|secret|"
    r"client[_-]?secret|sig|signature|x-(?:goog|amz)-(?:signature|credential|security-token)|awsaccesskeyid)=)"
    r"[^&;#]*"
)


def scrubbed(path: str) -> str:
    """A path with its query, or a query alone: `/a?access_token=x&b=1` -> `/a?access_token=REDACTED&b=1`."""
    if "=" not in path:
        return path
    return _CREDENTIAL.sub(rf"\g<name>{REDACTED}", path)
