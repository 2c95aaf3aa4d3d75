"""How does a comparison of strings or headers look on the wire? What routes and rules of access share."""

from __future__ import annotations

from typing import Any

from meshlib.model import HeaderMatch, StringMatch


def set_string(message: Any, match: StringMatch) -> None:
    """In a StringMatcher. Raises TypeError for a kind that none has."""
    if match.kind == "regex":
        message.safe_regex.regex = regex_of(match)
    elif match.kind not in ("exact", "prefix", "suffix", "contains"):
        raise TypeError(f"a string can't be matched by {match.kind}")
    elif not match.value and match.kind != "exact":
        message.safe_regex.regex = ".*"  # Envoy wants at least one character in all but exact
    else:
        setattr(message, match.kind, match.value)
        message.ignore_case = match.ignore_case


def regex_of(match: StringMatch) -> str:
    """Envoy's ignore_case and case_sensitive don't concern regular expressions; RE2 has a flag for it."""
    return f"(?i){match.value}" if match.ignore_case else match.value


def set_header(added: Any, header: HeaderMatch, *, has_old_fields: bool = False) -> None:
    """In a HeaderMatcher. has_old_fields: by its older fields, where they can say it: the RBAC of grpcio 1.66 refuses
    `string_match` (1.74's does not), and with it the whole listener, so that the rules from before would stay."""
    added.name, added.invert_match = header.name, header.invert
    match = header.match
    if match.kind == "present":
        added.present_match = True
    elif has_old_fields and match.kind == "regex":
        added.safe_regex_match.regex = regex_of(match)
    elif has_old_fields and not match.ignore_case and match.value:
        setattr(added, f"{match.kind}_match", match.value)
    else:
        set_string(added.string_match, header.match)
        added.treat_missing_header_as_empty = header.invert
