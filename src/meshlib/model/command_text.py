"""What does a text with Envoy's command operators consist of? `%REQ(X-A?:PATH):20% by %PROTOCOL%`.

Source: Envoy, configuration/observability/access_log/usage, and substitution_format_parser.cc. As there, a `%%` is a
percent sign, and names are in capital letters.
"""

from __future__ import annotations

import re
from functools import lru_cache

from meshlib.model.values import dataclass

OPERATORS = frozenset(
    {
        *("REQ", "REQ_WITHOUT_QUERY", "RESP", "ENVIRONMENT", "CEL"),
        *("PROTOCOL", "RESPONSE_CODE", "RESPONSE_CODE_DETAILS", "RESPONSE_FLAGS", "GRPC_STATUS", "GRPC_STATUS_NUMBER"),
        *("DURATION", "BYTES_RECEIVED", "BYTES_SENT", "ROUTE_NAME", "UPSTREAM_CLUSTER", "UPSTREAM_HOST"),
        *("UPSTREAM_REQUEST_ATTEMPT_COUNT", "REQUESTED_SERVER_NAME", "DOWNSTREAM_PEER_URI_SAN"),
        *("DOWNSTREAM_REMOTE_ADDRESS", "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", "DOWNSTREAM_REMOTE_PORT"),
        *("HOSTNAME", "TRACE_ID", "SPAN_ID"),
    }
)
"""Those that have an answer here."""
_WITH_ARGUMENT = frozenset({"REQ", "REQ_WITHOUT_QUERY", "RESP", "ENVIRONMENT", "CEL"})
_COMMAND = re.compile(r"%(?:%|([A-Z][A-Z0-9_]*)(?:\(([^%]*)\))?(?::(\d+))?%)")


@dataclass(frozen=True, slots=True)
class Command:
    """One operator. argument: what is in its parentheses. longest: characters of its value; 0 is no limit."""

    operator: str
    argument: str = ""
    longest: int = 0


@lru_cache(maxsize=256)
def parts_of(text: str) -> tuple[str | Command, ...]:
    """What stands for itself, and commands, in their order. Raises ValueError, which says what is wrong."""
    found: list[str | Command] = []
    end = 0
    for each in _COMMAND.finditer(text):
        if each.start() > end:
            found.append(_plain(text[end : each.start()]))
        end = each.end()
        operator, argument, longest = each.groups()
        if operator is None:
            found.append("%")
            continue
        if operator in _WITH_ARGUMENT and not argument:
            raise ValueError(f"%{operator}% needs to be told of what: %{operator}(...)%")
        found.append(Command(operator, argument or "", int(longest or 0)))
    if end < len(text):
        found.append(_plain(text[end:]))
    return tuple(found)


def _plain(text: str) -> str:
    if "%" in text:
        raise ValueError(f"{text!r} has a % that begins or ends no command operator; %% is a percent sign")
    return text
