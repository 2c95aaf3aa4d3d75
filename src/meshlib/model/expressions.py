"""Does a text fit, is this a regular expression, and does a substitution fit it? RE2's, as everywhere in Envoy and
Istio: no pattern can take more than linear time.

What is wrong is a text that goes on after the name of a field (`is no RE2 expression: ...`), so that each reader of
configuration says it in its own error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from meshlib.model.route import StringMatch


@lru_cache(maxsize=4096)
def compile_regex(pattern: str, ignore_case: bool = False) -> re.Pattern[str]:
    """Raises re2.error for a pattern that RE2 refuses."""
    import re2

    options = re2.Options()
    options.case_sensitive = not ignore_case
    options.log_errors = False
    compiled: re.Pattern[str] = re2.compile(pattern, options)
    return compiled


def compile_string(match: StringMatch) -> Callable[[str], bool]:
    """`regex` must match the whole string."""
    value = match.value
    if match.kind == "present":
        return lambda _: True
    if match.kind == "regex":
        full = compile_regex(value, match.ignore_case).fullmatch
        return lambda text: full(text) is not None
    if match.ignore_case:
        exact = compile_string(StringMatch(match.kind, value.lower()))
        return lambda text: exact(text.lower())
    if match.kind == "exact":
        return value.__eq__
    if match.kind == "prefix":
        return lambda text: text.startswith(value)
    if match.kind == "suffix":
        return lambda text: text.endswith(value)
    if match.kind == "contains":
        return lambda text: value in text
    stem = value.rstrip("/")
    return lambda text: text == stem or text.startswith(stem + "/")


def wrong_pattern(pattern: str) -> str:
    """ "" for a good one."""
    import re2

    try:
        compile_regex(pattern)
    except re2.error as error:
        told = error.args[0] if error.args else error
        return f"is no RE2 expression: {told.decode() if isinstance(told, bytes) else told}"
    return ""


def wrong_substitution(pattern: str, substitution: str) -> str:
    """What a call would trip over, "" for nothing: RE2 knows `\\0` to `\\9`, as many as `pattern`, which is a good one,
    has groups, and `\\\\`."""
    groups = compile_regex(pattern).groups
    for escaped in re.findall(r"\\(.?)", substitution, re.DOTALL):
        if escaped == "\\":
            continue
        if not escaped:
            return "has a backslash at its end"
        if escaped not in "0123456789":
            return f"has a backslash before {escaped!r}"
        if int(escaped) > groups:
            return f"has a \\{escaped} that is no group of the pattern, which has {groups}"
    return ""
