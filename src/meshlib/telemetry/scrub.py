"""What of a request's path, or of a line of a log, must not be written down? Credentials, by their name or form.

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


_IN_TEXT = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{4,}"), rf"\1 {REDACTED}"),
    (re.compile(r"\beyJ[\w-]{6,}\.[\w-]+\.[\w-]*"), REDACTED),  # a JSON Web Token, wherever it stands
    (re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"), REDACTED),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (
        re.compile(_CREDENTIAL.pattern.replace("[^&;#]*", r"[^&;#\s\"']*").replace("^|", r"^|\s|")),
        rf"\g<name>{REDACTED}",
    ),
)


def scrubbed_text(text: str) -> str:
    """A line of a log, without the credentials that can be told by their form or their name."""
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def scrubbed(path: str) -> str:
    """A path with its query, or a query alone: `/a?access_token=x&b=1` -> `/a?access_token=REDACTED&b=1`."""
    if "=" not in path:
        return path
    return _CREDENTIAL.sub(rf"\g<name>{REDACTED}", path)
