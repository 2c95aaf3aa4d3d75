"""meshlib.model.values: what it makes is what the standard library's dataclass makes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, field
from typing import Any, ClassVar

import pytest

from meshlib.model.values import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere."""

    region: str
    zones: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    known: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class Nothing:
    """No field."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a class says itself stays."""

    name: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")

    def __repr__(self) -> str:
        return f"<Own {self.name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and self.name.lower() == other.name.lower()


def test_values_with_equal_fields_are_equal_and_have_one_hash() -> None:
    """As far as the fields count; a value of another class is another value."""
    here, same, other = Place("a", ("b",)), Place("a", zones=("b",), notes={"x": "y"}), Place("a")
    assert here == same and hash(here) == hash(same)
    assert here != other and here != ("a", ("b",))
    assert {here: 1}[same] == 1
    assert Nothing() == Nothing() != Own("x")


def test_a_value_does_not_change() -> None:
    """Neither a field nor anything else can be set or deleted."""
    here: Any = Place("a")
    for name in ("region", "elsewhere"):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(here, name, "b")
    with pytest.raises(FrozenInstanceError, match="region"):
        del here.region
    assert not hasattr(here, "__dict__")


def test_arguments_are_those_of_the_fields() -> None:
    """In their order or by name; what has a default may be left out, and each value has a list of its own."""
    assert Place("a").notes is not Place("a").notes
    wrong: Any = Place
    for arguments in ((), ("a", (), {}, 1)):
        with pytest.raises(TypeError, match=r"Place\.__init__\(\)"):
            wrong(*arguments)
    with pytest.raises(ValueError, match="no name"):
        Own("")


def test_the_standard_library_knows_what_it_is() -> None:
    """fields, replace, match, copy and pickle."""
    here = Place("a", ("b",), {"c": "d"})
    assert [each.name for each in dataclasses.fields(here)] == ["region", "zones", "notes"]
    assert dataclasses.replace(here, region="z") == Place("z", ("b",))
    for twin in (copy.copy(here), copy.deepcopy(here), pickle.loads(pickle.dumps(here))):
        assert twin == here and twin is not here and twin.notes == {"c": "d"}
    match here:
        case Place("a", (zone,)):
            assert zone == "b"
        case _:
            raise AssertionError("it does not match")


def test_it_reads_as_the_standard_librarys() -> None:
    """`Place(region='a', zones=())`, without what is not to be shown; or as the class says itself."""
    assert repr(Place("a", notes={"c": "d"})) == "Place(region='a', zones=())"
    assert (repr(Nothing()), repr(Own("x"))) == ("Nothing()", "<Own x>")
    assert Own("X") == Own("x")


def test_other_dataclasses_are_the_standard_librarys() -> None:
    """With order, without frozen; and a field that could not be an argument is told."""

    @dataclass(frozen=True, slots=True, order=True)
    class Number:
        value: int

    assert Number(1) < Number(2)
    with pytest.raises(TypeError, match=r"Wrong\.value"):

        @dataclass(frozen=True, slots=True)
        class Wrong:
            value: int = field(init=False, default=1)
