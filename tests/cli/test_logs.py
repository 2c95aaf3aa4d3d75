"""What does meshctl logs print of two processes that call each other, with the access log of one of them on?"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli.test_tap import SERVICE, Running, _App, _settings, eventually
from dashboard.pictured_town import Town
from inbound.inbound_servers import uvicorn_server
from meshlib.cli.app import app
from meshlib.controlplane.admin_api import LogLine
from meshlib.controlplane.log_api import WantedLines
from meshlib.controlplane.log_store import FIELDS, LONGEST_NAME, LogStore, line_of
from meshlib.mesh import Mesh
from meshlib.telemetry.lines import MAX_LINES, Line, Lines, LinesHandler
from meshlib.telemetry.scrub import scrubbed_text
from promises import within
from telemetry.test_both_ends import _asgi

Meshctl = Callable[..., Result]
LOGGED = """
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: failures}
spec:
  selector: {matchLabels: {app: reviews}}
  accessLogging: [{match: {mode: SERVER}, filter: {expression: "response.code >= 500"}}]
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "reviews.yaml").write_text(SERVICE + LOGGED)
    serving = _App()
    with (
        uvicorn_server(serving) as url,
        Town(folder) as town,
        Mesh(_settings(town, "reviews", httpx.URL(url).netloc.decode(), telemetry_interval=0.2)) as server,
        Mesh(_settings(town, "productpage", telemetry_interval=0.2)) as client,
    ):
        serving.mesh = server.asgi(_asgi)
        server.serve()
        made = Running(town, server, client)
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def meshctl(running: Running) -> Meshctl:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--control-plane", running.town.url], env={"MESHCTL_ADMIN": ""})

    eventually(lambda: run("logs", "reviews").exit_code == 0, "a line of reviews has arrived")
    return run


def test_the_lines_that_are_kept_are_those_that_the_configuration_wants(meshctl: Meshctl) -> None:
    """Of failures only, of who serves only, in Istio's form, though the process has no logging set up."""
    lines = meshctl("logs", "reviews", "--tail", "5").stdout.splitlines()
    assert 1 <= len(lines) <= 5
    for line in lines:
        assert re.match(r'reviews-v1\.default in \[\d{4}-.*Z\] "GET /503 HTTP/1\.1" 503 - ', line), line
    nothing = meshctl("logs", "productpage-v1")
    assert (nothing.exit_code, "-f tells of every request" in nothing.stderr) == (1, True)
    assert meshctl("logs", "reviews", "--status", "404").exit_code == 1
    assert meshctl("logs", "reviews", "--status", "5xx", "--path", "/503", "--failed", "--tail", "1").exit_code == 0
    told = json.loads(meshctl("logs", "reviews-v1", "--kind", "access", "--tail", "1", "-o", "json").stdout)
    assert (told["kind"], told["fields"]["response_code"], told["direction"]) == ("access", "503", "in")
    assert told["instance"].startswith("reviews-v1-")


def test_whoever_follows_sees_every_request_for_as_long(running: Running) -> None:
    """The caller logs nothing by itself; credentials are left out; afterwards it is as before, and it was audited."""
    query = {"name": "productpage-v1", "path": "/200", "limit": "0", "rate": "50"}
    headers = {"content-type": "application/yaml"}
    url = f"{running.town.url}/v1/logs/follow"
    found: list[LogLine] = []
    deadline = time.monotonic() + within(20)
    with httpx.stream("POST", url, params=query, headers=headers, timeout=within(20)) as response:
        assert response.status_code == 200
        for text in response.iter_lines():
            assert time.monotonic() < deadline, "a line for whoever follows"
            if text.startswith("data: {") and '"fields"' in text:
                found.append(json.loads(text.removeprefix("data: ")))
                break
    line = found[0]
    assert line["fields"]["path"] == "/200?access_token=REDACTED&page=1"  # type: ignore[index]
    assert "hunter2" not in json.dumps(line)
    assert (line["direction"], line["workload"]) == ("out", "productpage-v1")  # type: ignore[index]
    eventually(lambda: not any(running.are_watched()), "nobody is watched any more")
    entries = httpx.get(f"{running.town.url}/v1/audit").json()["entries"]
    assert [each["object"] for each in entries if each["action"] == "logs"] == ["default/productpage-v1"]


def test_what_the_library_says_is_kept_too(running: Running, meshctl: Meshctl) -> None:
    """With its level, without credentials; --level and --grep find it."""
    logging.getLogger("meshlib.xds").warning("refused, with Authorization: Bearer abcdef123456")
    eventually(lambda: meshctl("logs", "--grep", "refused, with").exit_code == 0, "it has arrived")
    lines = meshctl("logs", "reviews-v1", "--kind", "mesh", "--level", "warning").stdout.splitlines()
    assert any(
        re.fullmatch(
            r"reviews-v1\.default WARNING \[.*Z\] meshlib\.xds: refused, with Authorization: Bearer REDACTED", each
        )
        for each in lines
    ), lines


def test_what_can_t_be_asked_for_is_said(meshctl: Meshctl) -> None:
    """In one sentence each."""
    assert "write 30s, 10m or 2h" in meshctl("logs", "--since", "yesterday").stderr
    assert "-f wants a name" in meshctl("logs", "-f").stderr
    assert "kind must be one of access, mesh" in meshctl("logs", "--kind", "all").stderr
    assert "no process of default/nobody is connected" in meshctl("logs", "nobody", "-f").stderr


def line(workload: str, text: str = "x", at: float = 0.0) -> LogLine:
    return line_of(
        {"istio.workload": workload, "service.namespace": "default"}, "meshlib.xds", at, "INFO", text, {}, "", ""
    )


def test_a_workload_that_talks_much_loses_its_own_lines() -> None:
    """At most so many of one, and so many in all."""
    store = LogStore(max_lines=300, of_one=200)
    store.add([line("quiet", at=1.0)])
    store.add([line("loud", at=float(number)) for number in range(1000)])
    kept = store.lines(0.0, lambda each: True, 5000)
    assert [each.workload for each in kept].count("loud") == 200
    store.add([line(f"another-{number}", at=2000.0) for number in range(200)])
    kept = store.lines(0.0, lambda each: True, 5000)
    assert len(kept) <= 300
    assert [each.workload for each in kept].count("quiet") == 1


def test_the_newest_line_of_each_workload_is_kept_while_others_have_more() -> None:
    """Also where all talk alike: nobody loses all of its lines for its last one."""
    store = LogStore(max_lines=400)
    for at in range(100):
        store.add([line(f"w-{number}", at=float(at)) for number in range(20)])
    newest = {each.workload: each.at for each in store.lines(0.0, lambda each: True, 5000)}
    assert newest == {f"w-{number}": 99.0 for number in range(20)}


def test_what_is_kept_of_one_line_is_bounded_and_redacted() -> None:
    """Whoever pushes may not be our library, and may have no good will."""
    told = {"path": "/a?access_token=s3cret", "authorization": "Bearer abcdefgh", "x" * 200: "1"}
    many = {f"field-{number}": "1" for number in range(1000)}
    found = line_of({"istio.workload": "w"}, "other", 1.0, "INFO", "", told | many, "0" * 5000, "1" * 5000)
    assert found.fields["path"] == "/a?access_token=REDACTED"
    assert found.fields["authorization"] == "Bearer REDACTED"
    assert (len(found.fields), len(found.trace_id), len(found.span_id)) == (FIELDS, 32, 16)
    assert all(len(name) <= LONGEST_NAME for name in found.fields)


def test_lines_that_nobody_fetches_are_dropped_and_counted() -> None:
    """The oldest first."""
    lines = Lines()
    for number in range(MAX_LINES + 3):
        lines.put(Line(0.0, logging.INFO, "meshlib", str(number)))
    assert lines.dropped == 3
    assert [each.text for each in lines.taken()][:1] == ["3"]
    assert lines.taken() == []


def test_a_warning_is_still_on_stderr_where_nobody_has_set_logging_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, however many of these handlers there are; and not where the application has a handler."""
    shown: list[logging.LogRecord] = []
    last = logging.Handler()
    last.emit = shown.append  # type: ignore[method-assign]
    last.setLevel(logging.WARNING)
    monkeypatch.setattr(logging, "lastResort", last)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    own = logging.getLogger("meshlib")
    handlers = [LinesHandler(Lines()), LinesHandler(Lines())]
    monkeypatch.setattr(own, "handlers", list(handlers))
    logging.getLogger("meshlib.xds").warning("once")
    assert [each.getMessage() for each in shown] == ["once"]
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    logging.getLogger("meshlib.xds").warning("not again")
    assert len(shown) == 1
    assert [each.text for each in handlers[1]._lines.taken()] == ["once", "not again"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Authorization: Bearer abc.def", "Authorization: Bearer REDACTED"),
        ("at https://user:pw@host/x", "at https://REDACTED@host/x"),
        ("got eyJhbGciOi.eyJzdWIi.c2ln in it", "got REDACTED in it"),
        ("GET /a?token=x&b=1 failed", "GET /a?token=REDACTED&b=1 failed"),
        ("-----BEGIN PRIVATE KEY-----\nabc", "REDACTED"),
        ("nothing to hide: 1.2.3", "nothing to hide: 1.2.3"),
    ],
)
def test_a_line_is_kept_without_its_credentials(text: str, told: str) -> None:
    """Whoever has written it."""
    assert scrubbed_text(text) == told


def test_a_filter_by_status_knows_its_class() -> None:
    """503 and 5xx; lines of no request have none."""
    access = line_of({}, "meshlib.access", 0.0, "INFO", "x", {"response_code": "503", "path": "/a"}, "", "")
    assert WantedLines("", "", status="5xx").fits(access)
    assert WantedLines("", "", status="503").fits(access)
    assert not WantedLines("", "", status="4xx").fits(access)
    assert not WantedLines("", "", status="5xx").fits(line("x"))
