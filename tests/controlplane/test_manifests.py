"""Would a real API server take what an installation applies? Kubernetes' own schemas say so, field by field.

What the chart renders is the same objects (tests/cli/test_chart.py).
"""

from __future__ import annotations

import copy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from meshlib.controlplane.installation import Installation, manifests, secret
from meshlib.kube.client import Object

ROOT_FOLDER = Path(__file__).parents[2]
PLATFORM = sorted((ROOT_FOLDER / "examples" / "bookinfo" / "platform").glob("*.yaml"))
VERSIONS = ("1.30", "1.34")
"""The oldest that is spoken of, and a new one."""
ROOT = "-----BEGIN CERTIFICATE-----\n"
CHOICES = (
    Installation(ROOT),
    Installation(ROOT, namespace="mesh", replicas=3, istio_crds=True),
    Installation(ROOT, injects=False),
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chosen", CHOICES, ids=["default", "several replicas", "without injection"])
def test_every_object_is_what_kubernetes_knows(chosen: Installation, version: str) -> None:
    """Strictly: a field that does not exist is an error too."""
    objects = [*manifests(chosen), secret(chosen, {"ca-key.pem": b"key"})]
    assert len(objects) >= 15
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", PLATFORM, ids=lambda file: file.name)
def test_bookinfo_is_what_kubernetes_knows(file: Path, version: str) -> None:
    """Its services, pods and the way in."""
    objects = [each for each in yaml.safe_load_all(file.read_text()) if each]
    assert objects
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("fault", ["replica", "containers"])
def test_the_schemas_do_find_faults(fault: str) -> None:
    """A field that is misspelt, and one of the wrong type."""
    broken: Object = copy.deepcopy(next(each for each in manifests(CHOICES[0]) if each["kind"] == "Deployment"))
    if fault == "replica":
        broken["spec"]["replica"] = 2
    else:
        broken["spec"]["template"]["spec"]["containers"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)
