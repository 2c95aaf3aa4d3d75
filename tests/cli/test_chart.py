"""The Helm chart says what `meshctl install` applies, whatever is chosen."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshlib.controlplane.installation import Installation, manifests

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("chart", ROOT / "scripts" / "chart.py")
assert SPEC is not None and SPEC.loader is not None
chart = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(chart)


def filled(text: str, values: dict[str, Any]) -> str:
    """As Helm fills it in, as far as the chart goes: conditions, values, and white space that is trimmed."""
    conditions = {
        ".Values.inject": values["inject"],
        ".Values.istioCRDs": values["istioCRDs"],
        "gt (int .Values.replicas) 1": values["replicas"] > 1,
        "le (int .Values.replicas) 1": values["replicas"] <= 1,
        chart.MISSING: True,
    }
    words = {
        ".Release.Namespace": "mesh",
        ".Values.image": values["image"],
        ".Values.trustDomain": values["trustDomain"],
        ".Values.replicas": values["replicas"],
        "max 5 .Values.replicas": max(5, values["replicas"]),
        "$root": "Um9vdA==",
    }
    found, shown = "", [True]
    for plain, trims, action in re.findall(r"(.*?)(?:\{\{(-?) (.*?) \}\}|\Z)", text, re.S):
        if shown[-1]:
            found += plain.rstrip() if trims else plain
        if action.startswith("if "):
            shown.append(shown[-1] and conditions[action.removeprefix("if ")])
        elif action == "end":
            shown.pop()
        elif action and shown[-1]:
            found += str(words[action])
    return found


def as_installed(rendered: dict[str, Any]) -> dict[str, Any]:
    """What `meshctl install` applies in its place: another manager, and no word to Helm of what it is to keep."""
    metadata = {**rendered["metadata"]}
    if "labels" in metadata:
        metadata["labels"] = {**metadata["labels"], "app.kubernetes.io/managed-by": "meshctl"}
    metadata["annotations"] = {
        key: each for key, each in metadata.get("annotations", {}).items() if key != "helm.sh/resource-policy"
    }
    if not metadata["annotations"]:
        del metadata["annotations"]
    found = {**rendered, "metadata": metadata}
    if rendered["kind"] == "Deployment":  # its pods say it, too
        found = yaml.safe_load(yaml.safe_dump(found).replace("managed-by: Helm", "managed-by: meshctl"))
    return found


def test_the_chart_in_the_repository_is_what_the_script_makes() -> None:
    """`python scripts/chart.py` was run after the last change."""
    there = {str(each.relative_to(chart.CHART)): each.read_text() for each in chart.CHART.rglob("*") if each.is_file()}
    assert there == chart.files()


@pytest.mark.parametrize(
    "chosen",
    [{}, {"replicas": 3}, {"replicas": 7, "inject": False}, {"istioCRDs": True, "image": "x:1", "trustDomain": "a.b"}],
    ids=str,
)
def test_it_says_what_install_applies(chosen: dict[str, Any]) -> None:
    """But for the Namespace, which `helm install --create-namespace` makes, who manages it and what Helm is to keep."""
    files = chart.files()
    values = {**yaml.safe_load(files["values.yaml"]), **chosen}
    text = "\n---\n".join(
        filled(each.removeprefix(chart.SECRET), values) for name, each in files.items() if name.startswith("templates/")
    )
    made = [as_installed(each) for each in yaml.safe_load_all(text) if each]
    given = Installation(
        "Root",
        "mesh",
        values["image"],
        values["replicas"],
        values["trustDomain"],
        values["inject"],
        values["istioCRDs"],
    )

    def by_key(objects: Any) -> dict[tuple[str, str, str], Any]:
        return {
            (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each for each in objects
        }

    assert by_key(made) == by_key(
        each for each in manifests(given) if (each["kind"], each["metadata"]["name"]) != ("Namespace", "mesh")
    )
