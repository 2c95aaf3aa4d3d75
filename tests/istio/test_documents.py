"""What YAML text means, where each value stands, and what can't be read."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshlib.istio.documents import MAX_DEPTH, InvalidYaml, is_text, split


def value(text: str) -> Any:
    (document,) = split(text)
    return document.value()


def wrong(text: str) -> tuple[int, str]:
    """(line, reason) of the first document that is none."""
    for document in split(text):
        try:
            document.value()
        except InvalidYaml as error:
            return error.line, error.reason
    raise AssertionError("all of it is YAML")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("yes", True),
        ("Off", False),
        ("y", "y"),
        ("~", None),
        ("", None),
        ("0x1F", 31),
        ("010", 8),
        ("0o10", 8),
        ("0b101", 5),
        ("09", 9.0),
        ("-1_000", -1000),
        ("12e4", 120000.0),
        (".5", 0.5),
        ("1e999", "1e999"),
        ("9" * 400, "9" * 400),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        (".inf", ".inf"),
        ("1.2.3", "1.2.3"),
        ("'80'", "80"),
        ('"on"', "on"),
        ("!!str 80", "80"),
        ("!!int '80'", 80),
    ],
)
def test_a_scalar_means_what_it_means_to_kubernetes(text: str, meaning: object) -> None:
    """YAML 1.1's truth values and numbers; quoted is text; dates and times of day stay text."""
    found = value(f"a: {text}\n")["a"]
    assert found == meaning
    assert type(found) is type(meaning)


def test_keys_are_text() -> None:
    """As JSON has them: a header named `on` and a label named `1` need no quotes."""
    assert value("on: 1\n1: 2\nnull: 3\n") == {"on": 1, "1": 2, "null": 3}


def test_aliases_and_merges() -> None:
    """What stands in a mapping itself comes before what is merged, and the first merged before the next."""
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], x: 0}\nd: {'<<': 5}\n"
    assert value(text)["c"] == {"x": 0, "y": 1, "z": 2}
    assert value(text)["d"] == {"<<": 5}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' stands here twice"),
        ("a:\n  b: 1\n\tc: 2\n", 3, "a tab"),
        ("[a]: 1\n", 1, "a key must be a word"),
        ("? {a: 1}\n: 2\n", 1, "a key must be a word"),
        ("a: 1\nb: *no\n", 2, "the alias *no stands before"),
        ("a: &a [*a]\n", 1, "the alias *a stands before, or inside"),
        ("a: !!python/object:os.system {}\n", 1, "has no meaning here"),
        ("a: !Ref x\n", 1, "has no meaning here"),
        ("a: !!binary aGk=\n", 1, "has no meaning here"),
        ("<<: 5\n", 1, "<< must name a mapping"),
        ("a: 'b\n", 2, "not YAML"),
        ("a: b: c\n", 1, "not YAML"),
        ("a: \0\n", 1, "control characters are not allowed"),
        ("a: \udc80\n", 1, "surrogates not allowed"),
        ("a: 1\n...\nb: 2\n", 3, "expected <document start>"),
        ("a: 1\x85--- 2\n", 2, "a second document must begin with ---"),
        ("a: 1\n---\nb: 2\n---\n# here\nc: [\n", 7, "not YAML"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text: str, line: int, reason: str) -> None:
    """Counted in the file, not in the document."""
    found = wrong(text)
    assert found[0] == line
    assert reason in found[1]


def test_few_lines_do_not_stand_for_billions_of_values() -> None:
    """The "billion laughs": each line names the one before ten times."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "values" in wrong("\n".join(lines))[1]


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000])
def test_deep_nesting_is_refused_before_anything_overflows(text: str) -> None:
    """PyYAML's composer would overflow the C stack."""
    assert wrong(text) == (1, f"nested deeper than {MAX_DEPTH} levels")


def test_aliases_count_with_the_depth_of_what_they_name() -> None:
    """Each is within bounds where it stands; together they would be 900 levels deep."""
    lines = ["a0: &a0 " + "[" * 90 + "]" * 90]
    lines += [f"a{n}: &a{n} " + "[" * 9 + f"*a{n - 1}" + "]" * 9 for n in range(1, 90)]
    assert wrong("\n".join(lines)) == (3, f"nested deeper than {MAX_DEPTH} levels")


def test_three_dashes_begin_a_document_wherever_they_stand_first() -> None:
    """A broken document before them hides none of those behind; empty ones, and comments alone, are none."""
    text = "\ufeff# nothing\n---\r\na: 1\r\n---\n# nothing\n---\nb: [\n---\nc: |\n  ---\n  text\n--- {d: 4}\n"
    documents = list(split(text))
    assert [document.line() for document in (documents[0], *documents[2:])] == [3, 9, 12]
    assert documents[0].value() == {"a": 1}
    with pytest.raises(InvalidYaml):
        documents[1].value()
    assert [document.value() for document in documents[2:]] == [{"c": "---\ntext\n"}, {"d": 4}]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), 3),
        (("spec",), 4),
        (("spec", "http", 0), 6),
        (("spec", "http", 1), 9),
        (("spec", "http", 1, "route", 1), 11),
        (("spec", "http", 1, "route", 1, "weight"), 12),
        (("spec", "http", 1, "route", 1, "weight", "deeper"), 12),
        (("spec", "http", 1, "nothing"), 9),
        (("spec", "http", 7), 5),
        (("status", "x"), 13),
    ],
)
def test_a_path_has_a_line(path: tuple[str | int, ...], line: int) -> None:
    """A key's, or an item's; what is not there has its nearest parent's."""
    (document,) = split(
        "# comment\n---\nkind: x\nspec:\n  http:\n  - match: [{a: 1}, {b: 2}]\n    route:\n    - host: a\n"
        "  - route:\n    - host: b\n    - host: c\n      weight: 5\nstatus: {}\n"
    )
    assert document.line(path) == line


def test_a_list_of_many_objects_is_read_in_time() -> None:
    """The lines of a document are found once, not once for each object: `kubectl get -A -o yaml` has thousands."""
    (document,) = split("items:\n" + "- {kind: x, metadata: {name: y}}\n" * 5000)
    began = time.monotonic()
    assert [document.line(("items", n)) for n in range(5000)] == list(range(2, 5002))
    assert time.monotonic() - began < 10  # searched from the top each time: half an hour


words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z")))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=20
)


@given(st.dictionaries(words, values))
def test_json_means_what_it_says(given: dict[str, Any]) -> None:
    """JSON is YAML, whatever its text holds."""
    assert value(json.dumps(given, ensure_ascii=False)) == given


@given(st.text(alphabet="0123456789.eE+-_xoabyesnfl~:", max_size=8))
def test_is_text_tells_what_needs_quotes(text: str) -> None:
    """The same answer as reading gives, for all that is a plain scalar at all."""
    try:
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        return
    if len(events) == 5 and isinstance(events[2], yaml.ScalarEvent) and events[2].value == text:
        (document,) = split(f"a: {text}\n") if text else (None,)
        assert is_text(text) == (document is not None and isinstance(document.value()["a"], str))
