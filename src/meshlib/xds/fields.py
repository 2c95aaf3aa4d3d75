"""What may stand in a field of a message? The checks that all decoders share; what fails one is Wrong, with the field's
name, and becomes InvalidResource in decode.py."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from meshlib.model import HeaderMatch, Locality, StringMatch
from meshlib.model.expressions import wrong_pattern, wrong_substitution

LONGEST = 315_576_000_000
"""Seconds: ten thousand years, the most that a Duration holds (duration.proto)."""
_PER_MILLION = {0: 10_000, 1: 100, 2: 1}
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-zA-Z-]+")
_NOT_IN_A_HEAD = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")


class Wrong(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def plain(struct: Any) -> dict[str, Any]:
    """A Struct as Python values."""
    return {key: _value(value) for key, value in struct.fields.items()}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return plain(value.struct_value)
    if kind == "list_value":
        return [_value(each) for each in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def note(metadata: Any, namespace: str, name: str) -> str:
    """A text of a Metadata; "" when it is not there, or no text."""
    if namespace not in metadata.filter_metadata:
        return ""
    noted = metadata.filter_metadata[namespace].fields
    return str(noted[name].string_value) if name in noted else ""


def text(metadata: dict[str, Any], name: str) -> str:
    found = metadata.get(name)
    return found if isinstance(found, str) else ""


def seconds(duration: Any, field: str, *, positive: bool = False) -> float:
    total = int(duration.seconds) * 1_000_000_000 + int(duration.nanos)
    if total < 0 or duration.seconds > LONGEST or not -1_000_000_000 < duration.nanos < 1_000_000_000:
        raise Wrong(field, f"is no time to wait: {duration.seconds} s and {duration.nanos} ns")
    if positive and not total:
        raise Wrong(field, "must be more than 0")
    # One division, so that what was rounded to nanoseconds comes back as the very float it was.
    return total / 1_000_000_000


def head_text(text: str, field: str) -> str:
    """Text that stands in a message's head one day: after a line break in it, a header would begin that nobody gave."""
    if _NOT_IN_A_HEAD.search(text):
        raise Wrong(field, f"holds a character that no header may hold: {text!r}")
    return text


def percent(message: Any, field: str) -> float:
    if not 0 <= message.value <= 100:  # not a number is neither
        raise Wrong(field, f"must be from 0 to 100, not {message.value}")
    return float(message.value)


def closed(message: Any, field: str, *passed_over: int) -> None:
    """Refuse what is not known in a message that restricts."""
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        number = unknown[index].field_number
        if number not in passed_over:
            raise Wrong(field, f"has field {number} of {message.DESCRIPTOR.full_name}, which is not understood here")


def without(message: Any, field: str, *numbers: int) -> None:
    """Refuse these fields, which are not known here."""
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        if (number := unknown[index].field_number) in numbers:
            raise Wrong(field, f"has field {number} of {message.DESCRIPTOR.full_name}, which is not understood here")


def locality(message: Any) -> Locality:
    return Locality(message.region, message.zone, message.sub_zone)


def share(fraction: Any) -> int:
    return min(1_000_000, int(fraction.numerator) * _PER_MILLION.get(fraction.denominator, 10_000))


def unpacked(any_message: Any, message_type: Any, field: str) -> Any:
    if any_message.type_url.rpartition("/")[2] != message_type.DESCRIPTOR.full_name:
        raise Wrong(field, f"holds {any_message.type_url or 'nothing'}, not {message_type.DESCRIPTOR.full_name}")
    try:
        return message_type.FromString(any_message.value)
    except DecodeError:
        raise Wrong(field, f"is no {message_type.DESCRIPTOR.full_name}") from None


def regex(pattern: str, field: str) -> str:
    if reason := wrong_pattern(pattern):
        raise Wrong(field, reason)
    return pattern


def substitution(pattern: str, text: str, field: str) -> None:
    if reason := wrong_substitution(pattern, text):
        raise Wrong(field, reason)


def string(message: Any, field: str) -> StringMatch:
    kind = message.WhichOneof("match_pattern")
    if kind is None:
        raise Wrong(field, "has no match_pattern that is known")
    if kind == "safe_regex":
        # "The ignore_case has no effect for the safe_regex match" (string.proto)
        return StringMatch("regex", regex(message.safe_regex.regex, f"{field}.safe_regex.regex"))
    return StringMatch(kind, getattr(message, kind), message.ignore_case)


def header(message: Any, field: str) -> list[HeaderMatch]:
    """One condition; two for an inverted one that wants the header to be there."""
    closed(message, field)
    kind, name = message.WhichOneof("header_match_specifier"), message.name.lower()
    if not name:
        raise Wrong(f"{field}.name", "is empty")
    if kind in (None, "present_match"):
        wanted = kind is None or message.present_match
        return [HeaderMatch(name, StringMatch("present"), message.invert_match == wanted)]
    if kind == "string_match":
        match = string(message.string_match, f"{field}.string_match")
    elif kind == "safe_regex_match":
        match = StringMatch("regex", regex(message.safe_regex_match.regex, f"{field}.safe_regex_match.regex"))
    else:
        match = StringMatch(kind.removesuffix("_match"), getattr(message, kind))
    found = HeaderMatch(name, match, message.invert_match)
    if message.invert_match and not message.treat_missing_header_as_empty:
        # Without that field, a header that is missing fits no value, inverted or not (route_components.proto).
        return [HeaderMatch(name, StringMatch("present")), found]
    return [found]
