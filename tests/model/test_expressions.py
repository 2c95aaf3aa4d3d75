"""What is wrong with an expression, in the words that every reader of configuration shows."""

from __future__ import annotations

import pytest

from meshlib.model.expressions import wrong_pattern, wrong_substitution


def test_a_pattern_is_re2s() -> None:
    """What needs backtracking is refused, and the reason is RE2's own."""
    assert wrong_pattern("/reviews/[0-9]+") == ""
    assert wrong_pattern("(") == "is no RE2 expression: missing ): ("
    assert wrong_pattern(r"(a)\1") == r"is no RE2 expression: invalid escape sequence: \1"


@pytest.mark.parametrize(
    ("substitution", "reason"),
    [
        (r"/\1/\0", ""),
        (r"a\\2", ""),
        (r"\2", r"has a \2 that is no group of the pattern, which has 1"),
        ("\\n", "has a backslash before 'n'"),
        ("a\\\n1", "has a backslash before '\\n'"),
        ("a\\", "has a backslash at its end"),
    ],
)
def test_a_substitution_names_groups_that_are_there(substitution: str, reason: str) -> None:
    """A call would trip over any other."""
    assert wrong_substitution("/(.*)", substitution) == reason
