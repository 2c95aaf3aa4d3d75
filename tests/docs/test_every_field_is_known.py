"""Is there a field of Istio's or the Gateway API's kinds that nobody here has thought of?

By the fields of their CRDs: each is one that the parser reads, and with that one of the reference's rows, or one that
the page of the Gateway API says to be without effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec.inspect as shapes
import pytest

from meshlib.istio import resources

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "how-to" / "gateway-api.md").read_text()
OTHER_SPELLINGS = {"VirtualService http.mirror_percent", "RequestAuthentication jwtRules.jwks_uri"}
"""Old names of fields that have a new one; the parser refuses them and says so."""

FILTERS = {"cors": "CORS", "extensionRef": "ExtensionRef", "externalAuth": "ExternalAuth"}


def fields(file: str) -> Iterator[tuple[str, str]]:
    """Kind and path; the file has a name a line, each two spaces deeper than what it is in."""
    steps: list[str] = []
    for line in (HERE / file).read_text().splitlines():
        if not line.startswith("#"):
            name = line.lstrip()
            steps = [*steps[: (len(line) - len(name)) // 2], name]
            if len(steps) > 1:
                yield steps[0], ".".join(steps[1:])


def below(shape: Any, name: str) -> Any:
    """The type of the field `name` in it; None where there is none, anything where anything may stand."""
    if isinstance(shape, shapes.UnionType):
        return next((found for each in shape.types if (found := below(each, name)) is not None), None)
    if isinstance(shape, shapes.StructType):
        return next((each.type for each in shape.fields if each.encode_name == name), None)
    if isinstance(shape, shapes.ListType):
        return below(shape.item_type, name)
    if isinstance(shape, shapes.DictType):
        return shape.value_type if name == "*" else shapes.AnyType()
    return None if isinstance(shape, shapes.NoneType) else shapes.AnyType()


def unknown(file: str, kinds: Mapping[str, resources.KindShape]) -> list[str]:
    found: list[str] = []
    for kind, path in fields(file):
        shape: Any = shapes.type_info(kinds[kind].spec)
        for step in path.split("."):
            shape = None if shape is None else below(shape, step)
        if shape is None and not any(f"{kind} {path}".startswith(f"{each}.") for each in found):
            found.append(f"{kind} {path}")
    return found


def test_istios_fields() -> None:
    """One that is not known is refused by name, and its author left alone with it."""
    assert set(unknown("istio_fields.txt", resources.SHAPES)) == OTHER_SPELLINGS


@pytest.mark.parametrize("path", unknown("gateway_api_fields.txt", resources.GATEWAY_API))
def test_the_gateway_apis_fields(path: str) -> None:
    """Read, or on the page: filters in what refuses a route, the rest in what has no effect."""
    name = re.split(r"[ .]", path)[-1]
    refuses, _, without = PAGE.partition("## What has no effect")
    if ".filters." in path:
        text, name = refuses.partition("asks for another filter")[2], FILTERS[name]
    else:
        text = without
    named = re.findall(r"`([\w.]+)`", text)
    assert any(each.rpartition(".")[2] == name for each in named), f"{path} is nowhere on the page"
