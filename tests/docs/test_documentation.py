"""Is what README, CONTRIBUTING and docs/ say still true? Links lead somewhere, snippets run, commands exist.

Every command of every page has a line in COMMANDS that says how it is held: a command that nobody runs will rot.
The tutorial runs as a whole in test_tutorial.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, Block, Command, anchors, blocks, commands, without_code

from peers import Answer, Peer, Received

TUTORIAL = ROOT / "docs" / "tutorial"
README = ROOT / "README.md"
# The virtual environment's meshctl, without the need to activate it.
MESHCTL = (sys.executable, "-m", "meshlib.cli")
SNIPPETS = list(blocks("python"))

# How each command outside the tutorial is held: what it begins with, and by what.
#   make     the target exists, and make knows what to do for it
#   help     meshctl has the command and every option that is shown; it needs a running control plane, and another test
#            runs it against one (tests/cli, tests/e2e)
#   run      it is run here
#   run here it is run in the repository; standard output is what is shown
#   extras   pyproject.toml has the distribution's name and the extra
#   run of   `meshctl run` takes the words; tests/instrumentation runs the same servers by it
#   words    shell words without a meaning of ours: they are checked by eye
COMMANDS = {
    "make ": "make",
    ".venv/bin/meshctl apply": "apply",
    ".venv/bin/meshctl proxy-status": "help",
    "meshctl control-plane": "help",
    "meshctl gateway": "help",
    "meshctl run -": "run of",
    "meshctl proxy-status": "help",
    "meshctl status": "help",
    "meshctl config": "help",
    "meshctl explain": "help",
    "meshctl problems": "help",
    "meshctl get": "help",
    "meshctl dashboard": "help",
    "meshctl stat": "help",
    "meshctl edges": "help",
    "meshctl traces": "help",
    "meshctl access": "help",
    "meshctl audit": "help",
    "meshctl breaker": "help",
    "meshctl logs": "help",
    "meshctl authz": "help",
    "meshctl ca ": "help",
    "meshctl token": "help",
    "meshctl identity": "help",
    "meshctl validate": "run",
    "meshctl analyze": "run here",
    "meshctl bootstrap": "help",
    "envoy -c": "words",
    "export GRPC_XDS_BOOTSTRAP": "words",
    "meshctl install": "help",
    "meshctl check": "help",
    "docker build": "words",
    "kubectl ": "words",
    "helm install": "words",
    "export MESHLIB_": "settings",
    "pip install": "extras",
    "git clone": "words",
    "kind ": "words",
    "minikube ": "words",
    "python3 -m venv": "words",
    ".venv/bin/pip install": "words",
    ". .venv/bin/activate": "words",
    "meshctl uninstall": "help",
}


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MESHLIB_", "MESHCTL_"))}
    return {**inherited, **more}


def run(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=60)


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT)
        if "docs" in page.relative_to(ROOT).parts:
            assert file.is_relative_to(ROOT / "docs"), f"{target} is no part of the site"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    """A page that no one can find is none."""
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}


def test_paths_that_are_named_exist() -> None:
    """`examples/...`, `src/...`, `docs/...`, `tests/...` and modules as CONTRIBUTING names them."""
    for page in PAGES:
        for path in re.findall(r"`((?:examples|src|docs|tests|benchmarks)/[\w./-]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
    reading = re.search(r"Read in this order: (.*?)\.", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert reading
    for module in re.findall(r"`([\w/]+)`", reading[1]):
        assert (ROOT / "src" / "meshlib" / f"{module}.py").exists(), module


def test_the_site_builds_without_a_network(tmp_path: Path) -> None:
    """mkdocs --strict, with every proxy pointing nowhere: no font, no schema, no inventory is fetched."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nowhere["NO_MKDOCS_2_WARNING"] = "1"  # the theme's advertisement for its successor
    result = run(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site"), cwd=ROOT, **nowhere)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    assert (tmp_path / "site" / "reference" / "istio" / "index.html").exists()


# Snippets


@pytest.mark.processes
@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.id)
def test_snippets_run(block: Block, tmp_path: Path) -> None:
    """Each by itself, in an empty folder, as a reader would paste it; nothing is left to the imagination.

    What has tests is run by pytest.
    """
    ast.parse(block.text)
    is_test = "\ndef test_" in block.text
    file = tmp_path / ("test_snippet.py" if is_test else "snippet.py")
    file.write_text(block.text)
    by = ("-m", "pytest", "-W", "error", "-p", "no:asyncio", "-p", "meshlib.pytest_plugin") if is_test else ()
    result = run(sys.executable, "-W", "error", *by, str(file), cwd=tmp_path, MESHLIB_CACHE_DIR="-")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""


REVIEWS = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: reviews}}
spec:
  hosts: [reviews]
  ports: [{{number: 9080, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: reviews}}
spec:
  hosts: [reviews]
  http:
  - match: [{{headers: {{end-user: {{exact: jason}}}}}}]
    directResponse: {{status: 200, body: {{string: for jason}}}}
  - route: [{{destination: {{host: reviews}}}}]
"""
# What a WSGI server does for one request; the user's header is not copied by a line of the application.
ONE_REQUEST = """
import io, json, sys

def served(**headers):
    environ = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "", "SERVER_NAME": "here",
               "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
               "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr, "wsgi.multithread": True,
               "wsgi.multiprocess": False, "wsgi.run_once": False, **headers}
    said = []
    body = application(environ, lambda status, headers, *rest: said.append((status, dict(headers))))
    text = b"".join(body).decode()
    getattr(body, "close", lambda: None)()
    return [*said, text]

print(json.dumps([served(), served(HTTP_END_USER="jason")]))
client.close()
mesh.close()
"""


@pytest.mark.processes
def test_the_example_of_the_readme_calls_reviews(tmp_path: Path) -> None:
    """The ten lines, a folder of YAML, a real server for reviews, and two requests: one of them jason's, who has a
    route of his own by a header that the example does not mention."""

    def answer(_: Received) -> Answer:
        return Answer(body=b'{"reviews": []}')

    (block,) = (block for block in SNIPPETS if block.page == README)
    (tmp_path / "snippet.py").write_text(block.text + ONE_REQUEST)
    (tmp_path / "mesh-config").mkdir()
    with Peer(answer) as peer:
        (tmp_path / "mesh-config" / "reviews.yaml").write_text(REVIEWS.format(port=peer.port))
        result = run(
            sys.executable, "-W", "error", "snippet.py", cwd=tmp_path,
            MESHLIB_CONTROL_PLANE="mesh-config/", MESHLIB_FORWARD_HEADERS="end-user", MESHLIB_CACHE_DIR="-",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        anybody, jason = json.loads(result.stdout)
    assert anybody == [["200 OK", {"content-type": "application/json"}], '{"reviews": []}']
    assert jason[1] == "for jason"
    assert [(each.method, each.target, each.header("host")) for each in peer.received] == [
        ("GET", "/reviews/0", "reviews:9080")
    ]


# Commands


def holder(command: Command) -> str | None:
    if command.page.parent == TUTORIAL:
        return "tutorial"
    return next((by for prefix, by in COMMANDS.items() if f"{command.text} ".startswith(prefix)), None)


def held_by(by: str) -> list[Any]:
    return [pytest.param(each, id=each.id) for each in commands() if holder(each) == by]


def test_every_command_is_held_by_a_test() -> None:
    """A new command in the documentation needs a line in COMMANDS, and a line there needs a command."""
    assert [command.id for command in commands() if holder(command) is None] == []
    unused = [prefix for prefix in COMMANDS if not any(f"{command.text} ".startswith(prefix) for command in commands())]
    assert unused == ["meshctl validate"] or unused == []


@pytest.mark.parametrize("command", held_by("make"))
def test_make_targets_exist(command: Command) -> None:
    """`make -n` says what would be done, and does nothing."""
    words = shlex.split(command.text, comments=True)
    result = run("make", "-n", *words[1:], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "Nothing to be done" not in result.stdout


def shows(command: Command) -> tuple[str, list[str]]:
    words = shlex.split(command.text, comments=True)
    return words[1], [word for word in words[2:] if word.startswith("-")]


@functools.cache
def help_of(name: str) -> str:
    """What `meshctl NAME --help` prints: asked once for all pages."""
    result = run(*MESHCTL, name, "--help", cwd=ROOT, TERMINAL_WIDTH="200", NO_COLOR="1")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.processes
@pytest.mark.parametrize("command", held_by("help"))
def test_meshctl_has_the_commands_and_options_shown(command: Command) -> None:
    """What runs them against a control plane is tests/cli and tests/e2e."""
    name, options = shows(command)
    shown = help_of(name)
    for option in options:
        assert option in shown


@pytest.mark.processes
@pytest.mark.parametrize("command", held_by("apply"))
def test_files_that_are_applied_are_valid(command: Command) -> None:
    """From the folder that the text is read in, without a control plane; test_tutorial.py applies the same files."""
    words = shlex.split(command.text)
    assert words[1:3] == ["apply", "-f"]
    result = run(*MESHCTL, "validate", *words[2:], cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.processes
@pytest.mark.parametrize("command", held_by("run"))
def test_commands_that_need_nothing_else_print_what_is_shown(command: Command, tmp_path: Path) -> None:
    """On a file with the content of the YAML that stands above the command."""
    *_, (_, shown) = ((b.line, b.text) for b in blocks("yaml") if b.page == command.page and b.line < command.line)
    program, *words = shlex.split(command.text)
    assert program == "meshctl"
    (tmp_path / words[words.index("-f") + 1]).write_text(shown)
    result = run(*MESHCTL, *words, cwd=tmp_path)
    assert result.stdout + result.stderr == command.printed
    assert result.returncode == (1 if "Error: " in command.printed else 0)


@pytest.mark.processes
@pytest.mark.parametrize("command", held_by("run here"))
def test_commands_about_the_examples_print_what_is_shown(command: Command) -> None:
    """The examples are in the repository."""
    program, *words = shlex.split(command.text)
    assert program == "meshctl"
    assert run(*MESHCTL, *words, cwd=ROOT).stdout == command.printed


@pytest.mark.parametrize("command", held_by("run of"))
def test_meshctl_run_takes_the_command_shown(command: Command) -> None:
    """All words after its own are the command's."""
    from typer.main import get_command

    from meshlib.cli.app import app

    _, name, *words = shlex.split(command.text)
    with get_command(app).commands[name].make_context(name, list(words)) as context:  # type: ignore[attr-defined]
        assert context.params["command"] == [word for word in words if word != "--"]


@pytest.mark.parametrize("command", held_by("extras"))
def test_the_distribution_has_the_extras(command: Command) -> None:
    """What `pip install` is told to install; the page that explains the extras names each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match = re.fullmatch(r"pip install '([\w-]+)\[([\w,-]+)\]'", command.text)
    assert match
    assert match[1] == project["name"]
    assert set(match[2].split(",")) <= set(project["optional-dependencies"])
    how_to = (ROOT / "docs" / "how-to" / "your-service.md").read_text()
    assert all(f"[{extra}]" in how_to for extra in project["optional-dependencies"])


@pytest.mark.parametrize("command", held_by("settings"))
def test_settings_that_are_exported_are_settings(command: Command) -> None:
    """By name, and with a value that is accepted."""
    from meshlib.settings import Settings

    given = dict(word.split("=", 1) for word in shlex.split(command.text)[1:])
    known = set(re.findall(r"^\| `(MESHLIB_\w+)`", (ROOT / "docs" / "reference" / "settings.md").read_text(), re.M))
    assert set(given) <= known
    Settings.from_environment(given)


def test_settings_are_all_there() -> None:
    """The page's table and the code's variables: the same names, and the defaults that it gives."""
    from meshlib.settings import Settings

    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    said = dict(re.findall(r"^\| `(MESHLIB_\w+)` \| (.+?) \|", page, re.MULTILINE))
    assert set(said) == {f"MESHLIB_{field.name.upper()}" for field in dataclasses.fields(Settings)}
    default = Settings.from_environment({})
    for name, told in said.items():
        if told.startswith("`"):
            value = getattr(default, name.removeprefix("MESHLIB_").lower())
            assert (f"{value:g}" if isinstance(value, float) else str(value)) == told.strip("`"), name
