"""Do the pages of docs/tutorial tell the truth? A reader follows them: the demo in one terminal, a shell in another.

Every line of its console blocks is typed into that shell and must print what the page shows; every comment
`check: NAME` is what the reader sees then, and a function `check_NAME` here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from pages import ROOT, commands

from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

PAGE = ROOT / "docs" / "tutorial" / "bookinfo.md"
AUTHORIZATION = PAGE.with_name("authorization.md")
OVER_GRPC = PAGE.with_name("bookinfo-grpc.md")
BIN = Path(sys.executable).parent
LIVE = 1.0
"""Seconds after which a change must be seen, by the page's own word."""
NO_REVIEWS = "Sorry, product reviews are currently unavailable for this book."
NO_RATINGS = "Ratings service is currently unavailable"


class Demo:
    """The first terminal: `meshctl demo`, on whatever ports are free. Every line that it prints is kept."""

    def __init__(self, home: Path, *options: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MESHLIB_", "MESHCTL_", "BOOKINFO_"))}
        self.environment = {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}",
            "XDG_STATE_HOME": str(home),
            "TMPDIR": str(home),
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            ["meshctl", "demo", "--port", "0", *options],
            env=self.environment, cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"Bookinfo is up: (http\S+)/productpage", line):
                break
        else:
            raise AssertionError("".join(self.lines))
        self.origin = found[1]
        # Nobody reads on, and a full pipe would stop the demo.
        self._rest = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True)
        self._rest.start()

    @property
    def admin(self) -> str:
        """Where every meshctl finds it, too."""
        announced = Path(self.environment["XDG_STATE_HOME"]) / "meshlib" / "control-plane.json"
        return str(json.loads(announced.read_text())["admin"])

    def interrupt(self) -> int:
        """Ctrl-C. The exit code."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(30)
        finally:
            self._rest.join(10)
            if self.process.stdout is not None:
                self.process.stdout.close()


class Shell:
    """The second terminal: one bash, so that `source` and `cd` hold for what follows."""

    MARK = "--- the command has ended: "

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.run("exec 2>&1")

    def run(self, command: str) -> tuple[str, int]:
        """What it prints, and its exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f'{command}\necho "{self.MARK}$?"\n')
        printed = ""
        for line in self.process.stdout:
            if line.startswith(self.MARK):
                return printed, int(line.removeprefix(self.MARK))
            printed += line
        raise AssertionError(f"the shell ended at {command!r}: {printed}")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


class Seen(NamedTuple):
    """What the page shows beside the reviews: `none`, `black`, `red`; or `no reviews`, `no ratings`."""

    stars: str
    seconds: float


class Reader:
    """Three browsers: jason's, somebody else's, and one that nobody has signed in with."""

    def __init__(self, origin: str, admin: str) -> None:
        self.admin = admin
        self.nobody, self.somebody, self.jason = (
            httpx.Client(base_url=origin, trust_env=False, timeout=20, follow_redirects=True) for _ in range(3)
        )
        for browser, name in ((self.somebody, "somebody"), (self.jason, "jason")):
            page = browser.post("/login", data={"username": name, "passwd": "any"})
            assert f"Signed in as <b>{name}</b>" in page.text

    def close(self) -> None:
        for browser in (self.nobody, self.somebody, self.jason):
            browser.close()

    def look(self, browser: httpx.Client) -> Seen:
        began = time.monotonic()
        page = browser.get("/productpage")
        seconds = time.monotonic() - began
        assert page.status_code == 200
        assert "Error fetching product details" not in page.text
        if NO_REVIEWS in page.text:
            return Seen("no reviews", seconds)
        if NO_RATINGS in page.text:
            return Seen("no ratings", seconds)
        colours = set(re.findall(r'class="stars"[^>]*style="color: (\w+)"', page.text))
        assert len(colours) < 2
        return Seen(colours.pop() if colours else "none", seconds)

    def until(self, browser: httpx.Client, wanted: str) -> Seen:
        """The first page that shows `wanted`: within a second of the change."""
        deadline = time.monotonic() + within(LIVE)
        while True:
            asked = time.monotonic()
            if (seen := self.look(browser)).stars == wanted:
                return seen
            assert asked < deadline, f"{LIVE} s after the change a page still shows {seen}"

    def stays(self, browser: httpx.Client, wanted: str) -> None:
        """From the first page that shows it, every page does."""
        self.until(browser, wanted)
        assert {self.look(browser).stars for _ in range(10)} == {wanted}


def check_all_versions_appear(reader: Reader) -> None:
    """60 pages, each version with p = 1/3: one is missing once in ten billion runs."""
    assert {reader.look(reader.nobody).stars for _ in range(60)} == {"none", "black", "red"}


def check_every_call_is_secured(reader: Reader) -> None:
    """Of those that processes make; the pages looked at so far have reached everybody."""
    deadline = time.monotonic() + 20
    while True:
        edges = httpx.get(f"{reader.admin}/v1/graph", trust_env=False, timeout=20).json()["edges"]
        found = {(each["source"], each["target"]): each["mtls"] for each in edges if each["source"].startswith("w")}
        if len(found) >= 5:
            assert set(found.values()) == {1.0}, found
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.1)  # processes push what they count each second


def check_plaintext_is_refused(reader: Reader) -> None:
    services = httpx.get(f"{reader.admin}/v1/endpoints", trust_env=False, timeout=20).json()["services"]
    address = next(each["endpoints"][0]["address"] for each in services if each["name"] == "details")
    deadline = time.monotonic() + within(LIVE)
    while (status := httpx.get(f"http://{address}/details/0", trust_env=False, timeout=20).status_code) != 403:
        assert time.monotonic() < deadline, status
    assert httpx.get(f"http://{address}/health", trust_env=False, timeout=20).status_code == 200


def check_no_stars(reader: Reader) -> None:
    reader.stays(reader.nobody, "none")


def check_jason_has_black_stars(reader: Reader) -> None:
    reader.stays(reader.jason, "black")


def check_others_have_no_stars(reader: Reader) -> None:
    reader.stays(reader.somebody, "none")
    reader.stays(reader.nobody, "none")


def check_jason_gets_no_reviews_after_6_seconds(reader: Reader) -> None:
    assert 6.0 <= reader.until(reader.jason, "no reviews").seconds < within(7.5)
    check_others_have_no_stars(reader)


def check_jason_gets_no_ratings(reader: Reader) -> None:
    assert reader.until(reader.jason, "no ratings").seconds < within(1)
    reader.stays(reader.jason, "no ratings")


def check_half_have_red_stars(reader: Reader) -> None:
    """200 pages, p = 1/2: outside 61..139 once in twenty million runs."""
    reader.until(reader.nobody, "red")  # until then there were none: from here on the change is live
    seen = [reader.look(reader.nobody).stars for _ in range(200)]
    assert set(seen) == {"none", "red"}
    assert 61 <= seen.count("red") <= 139


def check_red_stars(reader: Reader) -> None:
    """The weights before allowed them, too: only a page without them tells that the change is not live yet."""
    deadline = time.monotonic() + within(LIVE)
    run = 0
    while run < 30:  # thirty in a row are no accident of a half
        asked = time.monotonic()
        run = run + 1 if reader.look(reader.nobody).stars == "red" else 0
        assert run or asked < deadline


def check_no_reviews_after_1_second(reader: Reader) -> None:
    deadline = time.monotonic() + within(LIVE)
    while True:
        asked = time.monotonic()
        seen = reader.look(reader.nobody)
        # v2 gets the reviews; whoever gets none waits twice for half a second.
        if seen.stars == "no reviews":
            assert 1.0 <= seen.seconds < within(2)
            return
        assert asked < deadline, seen


def check_page_works(reader: Reader) -> None:
    assert "no reviews" not in {reader.look(reader.nobody).stars for _ in range(10)}


# Of authorization.md


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _says(browser: httpx.Client, *texts: str) -> bool:
    """The page comes, and says these and no other complaints."""
    page = browser.get("/productpage")
    complaints = ("Error fetching product details", NO_REVIEWS, NO_RATINGS)
    return page.status_code == 200 and all((each in page.text) is (each in texts) for each in complaints)


def check_nobody_gets_in(reader: Reader) -> None:
    eventually(lambda: reader.nobody.get("/productpage").status_code == 403)
    assert reader.nobody.get("/productpage").text == "RBAC: access denied"


def check_the_page_comes_without_details_and_reviews(reader: Reader) -> None:
    eventually(lambda: _says(reader.nobody, "Error fetching product details", NO_REVIEWS))


def check_the_page_comes_without_ratings(reader: Reader) -> None:
    """Of the versions of reviews, two ask for ratings."""
    eventually(lambda: _says(reader.nobody, NO_RATINGS))


def check_the_page_is_whole(reader: Reader) -> None:
    def is_whole() -> bool:
        return all(_says(reader.nobody) for _ in range(12))

    eventually(is_whole)


def check_strangers_are_refused(reader: Reader) -> None:
    services = httpx.get(f"{reader.admin}/v1/endpoints", trust_env=False, timeout=20).json()["services"]
    for name in ("ratings", "reviews", "details"):
        address = next(each["endpoints"][0]["address"] for each in services if each["name"] == name)
        answer = httpx.get(f"http://{address}/{name}/0", trust_env=False, timeout=20)
        assert (answer.status_code, answer.text) == (403, "RBAC: access denied")

    def is_in_the_log() -> bool:
        lines = httpx.get(f"{reader.admin}/v1/logs", params={"text": "/ratings/0"}, trust_env=False, timeout=20).text
        return "rbac_access_denied" in lines

    eventually(is_in_the_log)


def check_jason_gets_no_ratings_and_others_do(reader: Reader) -> None:
    eventually(lambda: _says(reader.jason, NO_RATINGS))
    assert all(_says(reader.somebody) for _ in range(12))


# Of bookinfo-grpc.md


def check_nobody_gets_ratings(reader: Reader) -> None:
    reader.stays(reader.nobody, "no ratings")


def check_ratings_are_asked_over_gRPC_by_mutual_TLS(reader: Reader) -> None:
    deadline = time.monotonic() + 20
    while True:
        edges = httpx.get(f"{reader.admin}/v1/graph", trust_env=False, timeout=20).json()["edges"]
        found = [each for each in edges if "ratings-grpc" in each["target"] and each["source"].startswith("w")]
        if found and all(each["mtls"] == 1.0 and each["protocol"] == "grpc" for each in found):
            return
        assert time.monotonic() < deadline, edges
        time.sleep(0.1)  # processes push what they count each second


CHECKS: dict[str, Callable[[Reader], None]] = {
    name.removeprefix("check_").replace("_", " "): value
    for name, value in globals().items()
    if name.startswith("check_")
}


class Step(NamedTuple):
    line: int
    command: str = ""
    printed: str = ""
    check: str = ""


def steps(page: Path = PAGE) -> list[Step]:
    """Commands and checks, in the order of the page."""
    found = [Step(each.line, each.text, each.printed) for each in commands() if each.page == page]
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if match := re.fullmatch(r"<!-- check: (.+) -->", line.strip()):
            found.append(Step(number, check=match[1]))
    return sorted(found)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("tutorial"))
    yield demo
    if demo.process.poll() is None:
        demo.interrupt()


def follow(page: Path, to_do: list[Step], demo: Demo) -> None:
    reader, shell = Reader(demo.origin, demo.admin), Shell(demo.environment)
    try:
        for step in to_do:
            if step.check:
                CHECKS[step.check](reader)
                continue
            if step.command.startswith("source ") and BIN != ROOT / ".venv" / "bin":
                continue  # the tests run in another environment, which is on PATH
            printed, code = shell.run(step.command)
            assert code == 0, f"{page.name}:{step.line}: {step.command}\n{printed}"
            if step.printed:
                assert printed == step.printed, f"{page.name}:{step.line}: {step.command}"
    finally:
        shell.close()
        reader.close()


def test_who_may_call_can_be_followed(demo: Demo) -> None:
    """Deny all, then allow one by one: on the demo's own processes and identities."""
    follow(AUTHORIZATION, steps(AUTHORIZATION), demo)


def test_the_tutorial_can_be_followed(demo: Demo) -> None:
    """From `source` to the last command. `make demo` is the terminal that runs already; Ctrl-C ends it."""
    first, *rest = steps()
    assert first.command == "make demo"
    follow(PAGE, rest, demo)
    assert demo.interrupt() == 0


def test_the_edition_over_grpc_can_be_followed(tmp_path: Path) -> None:
    """A demo of its own, with one option."""
    first, *rest = steps(OVER_GRPC)
    assert first.command == 'make demo DEMO="--grpc"'
    demo = Demo(tmp_path, "--grpc")
    try:
        follow(OVER_GRPC, rest, demo)
    finally:
        code = demo.interrupt()
    assert code == 0


def test_every_check_of_the_tutorial_is_known() -> None:
    """And none is left over here."""
    assert {step.check for page in (PAGE, AUTHORIZATION, OVER_GRPC) for step in steps(page) if step.check} == set(
        CHECKS
    )


def test_the_tutorial_shows_what_each_change_prints() -> None:
    """A reader compares line by line, so each apply and delete says what it answers."""
    changes = [step for step in steps() if step.command.startswith(("meshctl apply", "meshctl delete"))]
    assert len(changes) > 8
    assert [step.command for step in changes if not step.printed] == []
