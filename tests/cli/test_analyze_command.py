"""What does meshctl analyze print, and with which exit code? istioctl's words, keys and codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from kube.api_server import ApiServer, crd
from kube.cluster import Cluster
from meshlib.cli.app import app

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: reviews}
spec: {ports: [{name: http, port: 9080}]}
"""
RULE = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http: [{route: [{destination: {host: %s}}]}]
"""


def analyze(*words: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["analyze", *words], input=stdin, catch_exceptions=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "service.yaml").write_text(SERVICE)
    (tmp_path / "rule.yaml").write_text(RULE % "revews")
    return tmp_path


@pytest.fixture
def cluster(any_api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with Cluster(any_api) as cluster:
        cluster.kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield cluster


def test_what_is_wrong_is_told_as_istioctl_tells_it(here: Path) -> None:
    """The exit code is 79, and standard output holds the messages alone."""
    found = analyze("service.yaml", "rule.yaml")
    assert found.stdout == (
        'Error [IST0101] (VirtualService default/reviews rule.yaml:7) Referenced host not found: "revews"\n'
    )
    assert "Error: Analyzers found issues when analyzing service.yaml, rule.yaml." in found.stderr
    assert found.exit_code == 79


def test_what_is_well_is_said_on_stderr(here: Path) -> None:
    """Exit code 0; a folder and standard input are taken too."""
    (here / "rule.yaml").write_text(RULE % "reviews")
    for words, stdin in ((("service.yaml", "rule.yaml"), ""), ((".",), ""), (("service.yaml", "-"), RULE % "reviews")):
        found = analyze(*words, stdin=stdin)
        assert (found.stdout, found.exit_code) == ("", 0)
        assert found.stderr == f"✔ No validation issues found when analyzing {', '.join(words)}.\n"


def test_json_and_yaml_have_istioctls_keys(here: Path) -> None:
    """And both fail a CI job as the text does."""
    expected = [
        {
            "code": "IST0101",
            "documentationUrl": "https://istio.io/latest/docs/reference/config/analysis/ist0101/",
            "level": "Error",
            "message": 'Referenced host not found: "revews"',
            "origin": "VirtualService default/reviews",
            "reference": "rule.yaml:7",
        }
    ]
    for words, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        found = analyze("service.yaml", "rule.yaml", "-o", words)
        assert read(found.stdout) == expected
        assert found.exit_code == 79
        assert read(analyze("service.yaml", "-o", words).stdout) == []


def test_thresholds_and_suppressions(here: Path) -> None:
    """From which level on a message is shown, and from which on the command fails, are two things."""
    (here / "names.yaml").write_text("{apiVersion: v1, kind: Namespace, metadata: {name: frod}}")
    info = analyze("names.yaml")
    assert (info.exit_code, info.stdout.startswith("Info [IST0102] (Namespace frod names.yaml:1)")) == (0, True)
    assert analyze("names.yaml", "--failure-threshold", "Info").exit_code == 79
    hidden = analyze("names.yaml", "--failure-threshold", "Info", "--output-threshold", "Warning")
    assert (hidden.exit_code, hidden.stdout) == (79, "")
    assert analyze("names.yaml", "--failure-threshold", "Info", "-S", "IST0102=Namespace f*").exit_code == 0
    unknown = analyze("names.yaml", "--suppress", "IST9999=x")
    assert "Warning: Supplied message code 'IST9999' is an unknown message code" in unknown.stderr
    wrong = analyze("names.yaml", "--suppress", "IST0102")
    assert (wrong.exit_code, wrong.stderr.startswith("error: IST0102 is not a valid suppression value")) == (1, True)


def test_a_text_that_is_no_yaml_is_an_error_of_its_own(here: Path) -> None:
    """65, as istioctl has it; what could be read is looked at all the same."""
    (here / "broken.yaml").write_text("a: [")
    found = analyze("service.yaml", "broken.yaml")
    assert found.exit_code == 65
    assert found.stderr.startswith("Error(s) adding files: broken.yaml:2: not YAML")
    assert analyze("rule.yaml", "broken.yaml").exit_code == 79


def test_nothing_to_look_at_is_a_mistake(here: Path) -> None:
    """istioctl would take the cluster; which one that is should be said."""
    found = analyze()
    assert (found.exit_code, found.stderr) == (
        1,
        "error: what is to be analyzed? Name files, or --kubernetes\n",
    )


def test_a_cluster_is_analyzed_with_files_as_if_they_were_applied(here: Path, cluster: Cluster) -> None:
    """There are no lines then, but for the files'. Nothing is written to the cluster."""
    cluster.put(
        crd("VirtualService", "virtualservices", "networking.istio.io", "v1"),
        yaml.safe_load(SERVICE),
        yaml.safe_load(RULE % "gone"),
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "frod"}},
    )
    found = analyze("--kubernetes")
    expected = 'Error [IST0101] (VirtualService default/reviews) Referenced host not found: "gone"'
    assert found.stdout.splitlines()[0] == expected
    assert "Info [IST0102] (Namespace frod) The namespace is not" in found.stdout
    assert found.exit_code == 79
    told, about_the_namespace = analyze("--kubernetes", "-n", "default").stdout.splitlines()
    assert told == expected
    assert about_the_namespace.startswith("Info [IST0102] (Namespace default)")
    assert "analyzing namespace: frod" in analyze("--kubernetes", "-n", "frod", "--failure-threshold", "Info").stderr
    (here / "rule.yaml").write_text(RULE % "reviews")
    assert analyze("--kubernetes", "-n", "default", "rule.yaml").exit_code == 0
    assert {method for method, _ in cluster.api.requests} == {"GET"}


def test_half_a_cluster_is_not_analyzed(here: Path, cluster: Cluster) -> None:
    """What may not be read would look as if it were not there."""
    cluster.call(lambda: cluster.api.forbidden.add("services"))
    found = analyze("--kubernetes")
    assert found.exit_code == 1
    assert "services is forbidden" in found.stderr
    assert found.stdout == ""
