"""What do config and explain print of a process that is really connected?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from dashboard.pictured_town import BOOKINFO, Town
from discovery.feed import feed, node
from meshlib.cli.app import app
from meshlib.model import Node, Workload

Meshctl = Callable[..., Result]
REVIEWS = "reviews.default.svc.cluster.local"


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """Bookinfo's rules, reviews with a version each on two ports, and one caller that uses reviews."""
    folder = tmp_path_factory.mktemp("mesh")
    for name in ("destination-rule-reviews.yaml", "virtual-service-reviews-test-v2.yaml"):
        (folder / name).write_text((BOOKINFO / "networking" / name).read_text())
    (folder / "services.yaml").write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: reviews}\n"
        "spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}\n"
    )
    with Town(folder) as made:
        served = [
            Node(
                f"sidecar~127.0.0.1~reviews-{version}-1.default~default.svc.cluster.local",
                Workload(
                    f"reviews-{version}",
                    service="reviews",
                    labels=(("app", "reviews"), ("version", version)),
                    address="127.0.0.1",
                    port=port,
                ),
                ready=True,
            )
            for version, port in (("v1", 9001), ("v2", 9002))
        ]
        with (
            feed(made.target, of=served[0]),
            feed(made.target, of=served[1]),
            feed(made.target, of=node()) as caller,
        ):
            caller.source.want("reviews:9080")
            caller.wait_for(lambda now: sum(len(each.endpoints) for each in now.assignments) == 2)
            yield made


@pytest.fixture
def meshctl(town: Town) -> Meshctl:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--control-plane", town.url], env={"MESHCTL_ADMIN": ""})

    return run


def test_a_process_holds_what_it_asked_for(meshctl: Meshctl) -> None:
    """The caller's listener, its routes with their file, clusters and endpoints; the others hold nothing of it."""
    assert meshctl("config", "listeners", "a-1.default").stdout.split()[3:] == [
        "reviews:9080",
        "outbound",
        f"outbound|9080||{REVIEWS}",
    ]
    routes = meshctl("config", "routes", "a").stdout.splitlines()
    assert routes[0].split("  ")[0] == "NAME"
    assert any("end-user exact 'jason'" in line and f"outbound|9080|v2|{REVIEWS}" in line for line in routes)
    assert all("VirtualService default/reviews" in line for line in routes[1:])
    clusters = [line.split() for line in meshctl("config", "cluster", "a").stdout.splitlines()[1:]]
    assert {tuple(line[:5]) for line in clusters} == {
        (REVIEWS, "9080", subset, "outbound", "EDS") for subset in ("v1", "v2")
    }
    endpoints = [line.split() for line in meshctl("config", "endpoints", "a").stdout.splitlines()[1:]]
    assert sorted((line[0], line[1], line[6], line[7]) for line in endpoints) == [
        ("127.0.0.1:9001", "HEALTHY", "reviews-v1", f"outbound|9080|v1|{REVIEWS}"),
        ("127.0.0.1:9002", "HEALTHY", "reviews-v2", f"outbound|9080|v2|{REVIEWS}"),
    ]
    nothing = meshctl("config", "routes", "reviews-v1")
    assert (nothing.exit_code, "holds no routes" in nothing.stderr) == (1, True)


def test_programs_get_every_field(meshctl: Meshctl) -> None:
    """As JSON and as YAML, the same."""
    told = json.loads(meshctl("config", "clusters", "a", "-o", "json").stdout)
    assert told == yaml.safe_load(meshctl("config", "clusters", "a", "-o", "yaml").stdout)
    assert {each["subset"] for each in told["clusters"]} == {"v1", "v2"}
    assert all(each["connect_timeout"] == 10.0 for each in told["clusters"])


def test_explain_says_where_a_request_would_go(meshctl: Meshctl) -> None:
    """jason's and anybody's, each with the object that says so."""
    url = "http://reviews:9080/reviews/0"
    jason = meshctl("explain", url, "--from", "a", "-H", "end-user: jason").stdout
    assert f"goes to outbound|9080|v2|{REVIEWS}" in jason
    assert "127.0.0.1:9002, reviews-v2" in jason
    assert "VirtualService default/reviews" in jason
    assert re.search(r"Configuration \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ/[0-9a-f]{8}, virtual host", jason)
    anybody = json.loads(meshctl("explain", url, "--from", "a", "-o", "json").stdout)
    assert anybody["outcome"] == f"goes to outbound|9080|v1|{REVIEWS}"
    assert [route["fits"] for route in anybody["routes"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("config", "pods", "a"), "pods: there are listeners, routes, clusters, endpoints"),
        (("config", "routes", "b"), "b is not connected; there are: a-1.default, reviews-v1-1.default"),
        (("explain", "reviews", "--from", "a"), "an absolute URL is wanted"),
        (("explain", "http://reviews:9080/", "--from", "a", "-H", "jason"), "a header is NAME: VALUE"),
        (("explain", "http://reviews:9080/", "--from", "a", "-o", "xml"), "there is json"),
    ],
)
def test_what_can_not_be_shown_is_said(meshctl: Meshctl, words: tuple[str, ...], reason: str) -> None:
    """One sentence, and exit code 1."""
    result = meshctl(*words)
    assert result.exit_code == 1
    assert reason in result.stderr
