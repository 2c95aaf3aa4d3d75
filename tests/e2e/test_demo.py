"""Does `meshctl demo` do what the README and the tutorial say? Ten real processes, and nothing that knows of tests."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509

import meshlib
from promises import within

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
NETWORKING = ROOT / "examples" / "bookinfo" / "networking"
MESHCTL = (sys.executable, "-m", "meshlib.cli")
NO_REVIEWS = "Sorry, product reviews are currently unavailable for this book."


class Demo:
    """`meshctl demo` as a process; every line it prints is kept."""

    def __init__(self, home: Path, *options: str, **environment: str) -> None:
        own = {"XDG_STATE_HOME": str(home), "TMPDIR": str(home), "PYTHONUNBUFFERED": "1"}
        self.environment = {**os.environ, **own, **environment}
        self.environment.pop("MESHCTL_ADMIN", None)
        self.process = subprocess.Popen(
            [*MESHCTL, "demo", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=self.environment, cwd=home, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._browsers: list[httpx.Client] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._more:
                    self.lines.append(line.rstrip("\n"))
                    self._more.notify_all()
        with self._more:
            self._more.notify_all()

    def line(self, pattern: str, after: int = 0, timeout: float = 90) -> re.Match[str]:
        """The first line from number `after` on that fits, as soon as it is printed."""

        def find() -> re.Match[str] | None:
            return next((found for line in self.lines[after:] if (found := re.search(pattern, line))), None)

        with self._more:
            self._more.wait_for(lambda: find() or not self._reader.is_alive(), timeout)
            found = find()
        assert found is not None, f"no line {pattern!r} in:\n" + "\n".join(self.lines)
        return found

    @property
    def page(self) -> str:
        return self.line(r"Bookinfo is up: (\S+)")[1]

    def address(self, service: str) -> tuple[str, int]:
        """Where one of its processes listens."""
        log = Path(self.line(r"logs in (\S+)")[1]) / f"{service}.log"
        found = re.search(r"listens on http://([0-9.]+):(\d+)", log.read_text())
        assert found is not None
        return found[1], int(found[2])

    @property
    def admin(self) -> str:
        """The control plane's URL."""
        return self.line(r"^control plane: xDS \S+, admin (\S+);")[1]

    def pids(self) -> dict[str, int]:
        """The latest process of each part."""
        found = (re.fullmatch(r"(.+) is starting: pid (\d+)", line) for line in self.lines)
        return {match[1]: int(match[2]) for match in found if match}

    def meshctl(self, *words: str, folder: Path = NETWORKING) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*MESHCTL, *words], env=self.environment, cwd=folder, capture_output=True, text=True, timeout=60
        )

    def browser(self, user: str = "") -> httpx.Client:
        root = self.page.removesuffix("/productpage")
        browser = httpx.Client(base_url=root, trust_env=False, timeout=20.0, follow_redirects=True)
        self._browsers.append(browser)
        if user:
            assert "Signed in as" in browser.post("/login", data={"username": user, "passwd": "any"}).text
        return browser

    def stop(self) -> int:
        """As Ctrl-C does. Its exit code."""
        for browser in self._browsers:
            browser.close()
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(30)
        self._reader.join(10)
        return code


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("demo"), "--port", "0")
    try:
        assert demo.page
        yield demo
    finally:
        demo.stop()


def stars(page: httpx.Response) -> str:
    """What the page shows beside each review: `none`, `black`, `red`; its error text if it has no reviews."""
    assert page.status_code == 200
    if NO_REVIEWS in page.text:
        return "no reviews"
    if "Ratings service is currently unavailable" in page.text:
        return "no ratings"
    return next((colour for colour in ("black", "red") if f"color: {colour}" in page.text), "none")


class Checks:
    """What one sees on the page. (The tutorial has a test of its own, tests/docs.)"""

    def __init__(self, demo: Demo) -> None:
        self.anybody = demo.browser("somebody")

    def many(self, count: int = 8) -> list[str]:
        return [stars(self.anybody.get("/productpage")) for _ in range(count)]

    def settled(self, wanted: str, browser: httpx.Client) -> None:
        """A change is live within a second; no page after that shows anything else."""
        deadline = time.monotonic() + within(1.0)
        asked = time.monotonic()
        while stars(browser.get("/productpage")) != wanted:
            assert asked < deadline, f"no page with {wanted} stars within a second"
            asked = time.monotonic()
        assert {stars(browser.get("/productpage")) for _ in range(8)} == {wanted}

    def no_stars(self) -> None:
        self.settled("none", self.anybody)

    def red_stars(self) -> None:
        self.settled("red", self.anybody)

    def page_works(self) -> None:
        assert "no reviews" not in self.many()


def test_everybody_is_connected_and_in_sync(demo: Demo) -> None:
    """Seven services and the gateway; nobody has refused anything."""
    rows = [line.split() for line in demo.meshctl("proxy-status").stdout.splitlines()[1:]]
    assert sorted(row[0].partition("-")[0] for row in rows) == [
        "details", "istio", "productpage", "ratings", "ratings", "reviews", "reviews", "reviews",
    ]  # fmt: skip
    assert not any("NACKED" in row for row in rows)


def test_a_page_is_one_trace(demo: Demo) -> None:
    """Gateway, page, details and reviews in one tree below whoever asked; no service copies a header for that."""
    trace_id, caller = "5b" * 16, "7c" * 8
    browser, admin = demo.browser(), demo.line(r"admin (http://[^;\s]+)")[1]
    asked = {"traceparent": f"00-{trace_id}-{caller}-01"}
    assert browser.get("/productpage", headers=asked).status_code == 200
    started = time.monotonic()
    while True:
        answer = httpx.get(f"{admin}/v1/traces/{trace_id}", trust_env=False, timeout=20)
        spans = answer.json()["spans"] if answer.status_code == 200 else []
        known = {caller, *(each["span_id"] for each in spans)}
        told = {each["service"] for each in spans if each["kind"] == "server"}
        is_whole = all(each["parent_id"] in known for each in spans)
        if len(spans) >= 7 and is_whole and told >= {"istio-ingressgateway", "productpage", "details", "reviews"}:
            break
        assert time.monotonic() - started < 30, f"no whole tree, but {spans}"
        time.sleep(0.1)
    assert [each["service"] for each in spans if each["parent_id"] == caller] == ["istio-ingressgateway"]
    assert {each["service"] for each in spans} >= {"istio-ingressgateway", "productpage", "details", "reviews"}
    servers = {each["service"]: each for each in spans if each["kind"] == "server"}
    by_id = {each["span_id"]: each for each in spans}
    entry = by_id[servers["productpage"]["parent_id"]]
    assert (entry["service"], entry["parent_id"]) == (
        "istio-ingressgateway",
        servers["istio-ingressgateway"]["span_id"],
    )
    assert by_id[servers["details"]["parent_id"]]["service"] == "productpage"
    called = dict(by_id[servers["reviews"]["parent_id"]]["attributes"])
    assert called["mesh.cluster"] == "outbound|9080||reviews.default.svc.cluster.local"
    assert called["mesh.response_flags"] == "-" and called["mesh.attempts"] == "1"


def test_every_call_is_by_mutual_tls(demo: Demo) -> None:
    """From the gateway to the last service; each process shows its service account, and the tokens are spent."""
    browser, admin = demo.browser(), demo.line(r"admin (http://[^;\s]+)")[1]

    def calls() -> dict[tuple[str, str], float]:
        assert browser.get("/productpage").status_code == 200
        edges = httpx.get(f"{admin}/v1/graph", trust_env=False, timeout=20).json()["edges"]
        return {(each["source"], each["target"]): each["mtls"] for each in edges if each["source"].startswith("w")}

    until(lambda: len(calls()) >= 5)
    assert set(calls().values()) == {1.0}
    tokens = httpx.get(f"{admin}/v1/tokens", trust_env=False, timeout=20).json()["tokens"]
    assert {each["identity"] for each in tokens if each["state"] == "used"} == {
        *(
            f"spiffe://cluster.local/ns/default/sa/bookinfo-{name}"
            for name in ("productpage", "details", "reviews", "ratings")
        ),
        "spiffe://cluster.local/ns/istio-system/sa/istio-ingressgateway-service-account",
    }


class Load:
    """Pages, one after the other, on three threads, until stop()."""

    def __init__(self, demo: Demo) -> None:
        self.statuses: list[int] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(demo.browser(),)) for _ in range(3)]
        for thread in self._threads:
            thread.start()

    def _run(self, browser: httpx.Client) -> None:
        while not self._over.is_set():
            page = browser.get("/productpage")
            # productpage answers 200 also when the services behind it do not; then the page says so.
            self.statuses.append(page.status_code if "Error fetching" not in page.text else 0)

    def more(self, count: int = 30) -> None:
        """Returns when so many more pages have come."""
        wanted, deadline = len(self.statuses) + count, time.monotonic() + 30
        while len(self.statuses) < wanted:
            assert time.monotonic() < deadline
            self._over.wait(0.01)

    def stop(self) -> set[int]:
        self._over.set()
        for thread in self._threads:
            thread.join()
        return set(self.statuses)


def until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_edits_fail_no_request_in_flight(demo: Demo) -> None:
    """Ten of them, under load."""
    load = Load(demo)
    for name in ("all-v1", "reviews-v3", "reviews-test-v2", "reviews-90-10", "reviews-v2-v3") * 2:
        assert demo.meshctl("apply", "-f", f"virtual-service-{name}.yaml").returncode == 0
        load.more(5)
    assert load.stop() == {200}


def test_a_killed_process_costs_no_page_and_is_started_again(demo: Demo) -> None:
    """ratings has two replicas; the calls to the one that was killed are made to the other."""
    demo.meshctl("apply", "-f", "virtual-service-all-v1.yaml")
    demo.meshctl("apply", "-f", "virtual-service-reviews-v3.yaml")
    load = Load(demo)
    load.more()
    seen = len(demo.lines)
    os.kill(demo.pids()["ratings-v1-a"], signal.SIGKILL)
    demo.line(r"ratings-v1-a is down: was ended by SIGKILL; starting it again", seen)
    demo.line(r"ratings-v1-a is up", seen)
    load.more()
    assert load.stop() == {200}


def test_a_worker_that_its_server_replaces_has_an_identity(demo: Demo) -> None:
    """gunicorn starts it, not the demo; a token that was not used yet lies ready all the same."""

    def members() -> set[str]:
        return {row.split()[0] for row in demo.meshctl("proxy-status").stdout.splitlines() if row.startswith("details")}

    before = members()
    worker = subprocess.run(
        ["pgrep", "-P", str(demo.pids()["details-v1"])], capture_output=True, text=True, check=True, timeout=20
    )
    os.kill(int(worker.stdout), signal.SIGKILL)
    until(lambda: len(after := members()) == 1 and after != before)
    Checks(demo).page_works()


def test_without_the_control_plane_every_page_comes_and_then_edits_work_again(demo: Demo) -> None:
    """What was applied is still in force after its restart."""
    assert demo.meshctl("apply", "-f", "virtual-service-reviews-v3.yaml").returncode == 0
    checks = Checks(demo)
    checks.red_stars()
    load = Load(demo)
    load.more()
    seen = len(demo.lines)
    os.kill(demo.pids()["control plane"], signal.SIGKILL)
    load.more()
    demo.line(r"control plane is up", seen)
    until(lambda: len(demo.meshctl("proxy-status").stdout.splitlines()) == 9)
    load.more()
    assert load.stop() == {200}
    checks.red_stars()
    assert demo.meshctl("apply", "-f", "virtual-service-all-v1.yaml").returncode == 0
    checks.no_stars()


def test_a_refused_object_changes_nothing(demo: Demo, tmp_path: Path) -> None:
    """File, object, field and reason; everything else stays in force."""
    text = (NETWORKING / "virtual-service-reviews-v3.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("subset:", "subst:"))
    result = demo.meshctl("apply", "-f", "bad.yaml", folder=tmp_path)
    assert result.returncode == 1
    assert re.fullmatch(
        r"Error: bad\.yaml:\d+: VirtualService default/reviews: spec\.http\[0\]\.route\[0\]\.destination\.subst: .*\n",
        result.stderr,
    )
    Checks(demo).no_stars()


def test_prometheus_finds_every_process_of_the_demo(demo: Demo) -> None:
    """By the line that the demo prints; each is a process that answers."""
    targets = httpx.get(demo.line(r"for Prometheus \(http_sd_configs\): (\S+)")[1], trust_env=False, timeout=20).json()
    workloads = sorted(each["labels"]["workload"] for each in targets)
    assert (len(workloads), workloads.count("ratings-v1")) == (8, 2)
    addresses = {each["targets"][0] for each in targets}
    assert len(addresses) == 8
    for address in addresses:
        told = httpx.get(f"http://{address}/stats/prometheus", trust_env=False, timeout=20).text
        assert "meshlib_certificate_expiry_timestamp_seconds" in told


def test_the_certificates_of_a_process_are_those_that_it_shows(demo: Demo) -> None:
    """meshctl config secrets has the serial number of what it serves by, and the root that has signed it."""
    address = demo.address("productpage-v1")
    served = x509.load_pem_x509_certificate(ssl.get_server_certificate(address, timeout=30).encode())
    deadline = time.monotonic() + within(30)  # it tells with its metrics
    while (told := demo.meshctl("config", "secrets", "productpage-v1")).returncode and time.monotonic() < deadline:
        time.sleep(0.2)
    header, own, root = (re.split(r"  +", line.strip()) for line in told.stdout.splitlines())
    assert header[:3] == ["RESOURCE NAME", "TYPE", "STATUS"]
    assert own[:4] == ["default", "Cert Chain", "ACTIVE", "true"]
    assert own[4] == f"{served.serial_number:x}"
    assert own[5] == served.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert root[:4] == ["ROOTCA", "CA", "ACTIVE", "true"]


def test_a_second_demo_takes_other_ports_and_says_so(demo: Demo, tmp_path: Path) -> None:
    """And leaves the first one alone."""
    second = Demo(tmp_path, "--port", demo.page.rpartition(":")[2].partition("/")[0], "--exit-when-ready")
    assert second.page != demo.page
    assert second.process.wait(60) == 0
    second.line(r"port \d+ is taken: the gateway uses \d+")
    if any("xDS 127.0.0.1:15010" in line for line in demo.lines):  # unless somebody else had it before the first
        second.line(r"port 15010 is taken: the control plane \(xDS\) uses \d+")
    assert not any(is_alive(pid) for pid in second.pids().values())
    Checks(demo).page_works()


def test_services_that_know_no_mesh_are_on_it(tmp_path: Path) -> None:
    """As in Kubernetes' pods: Bookinfo without a line of ours, under PYTHONPATH. Names that only the mesh knows are
    called, by sync and async clients, and served by mutual TLS alone, by gunicorn and uvicorn."""
    autostart = Path(meshlib.__file__).parent / "instrumentation" / "autostart"
    demo = Demo(tmp_path, "--port", "0", BOOKINFO_MESH="off", PYTHONPATH=str(autostart))
    try:
        browser = demo.browser()
        strict = tmp_path / "strict.yaml"
        strict.write_text(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
            "metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n"
        )
        assert demo.meshctl("apply", "-f", str(strict)).returncode == 0
        seen: set[str] = set()
        deadline = time.monotonic() + within(30)
        while seen != {"none", "black", "red"} and time.monotonic() < deadline:
            seen.add(stars(browser.get("/productpage")))
        assert seen == {"none", "black", "red"}
        host, port = demo.address("productpage-v1")
        assert httpx.get(f"http://{host}:{port}/productpage", trust_env=False).status_code == 403  # in plaintext
    finally:
        assert demo.stop() == 0


def test_ctrl_c_leaves_no_process(demo: Demo) -> None:
    """Not in ten groups: the last test, since it ends the demo."""
    pids = demo.pids()
    assert len(pids) == 9
    assert all(is_alive(pid) for pid in pids.values())
    assert demo.stop() == 0
    assert not any(is_alive(pid) for pid in pids.values())
    admin = demo.line(r"admin (http://\S+);")[1]  # by name, since somebody else's demo may be running
    assert f"no control plane is running at {admin}" in demo.meshctl("get", "--control-plane", admin).stderr


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
