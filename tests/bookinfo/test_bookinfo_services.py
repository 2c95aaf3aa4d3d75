"""Do Bookinfo's four services answer as Istio's do? Each as a real process, off the mesh, with stubs for what it calls.

Endpoints, payloads, environment variables and failure texts are those of istio/istio samples/bookinfo/src.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from peers import Answer, Peer, Received, refusing_port
from promises import within

pytestmark = [pytest.mark.processes]

SERVICES = Path(__file__).parents[2] / "examples" / "bookinfo" / "services"
DETAILS = {
    "id": 0,
    "author": "William Shakespeare",
    "year": 1595,
    "type": "paperback",
    "pages": 200,
    "publisher": "PublisherA",
    "language": "English",
    "ISBN-10": "1234567890",
    "ISBN-13": "123-1234567890",
}
RATINGS = {"Reviewer1": 5, "Reviewer2": 4}
NO_RATINGS = "Ratings service is currently unavailable"
# Whatever the developer's shell says of these would change what is tested.
FROM_OUTSIDE = re.compile(r"MESHLIB_|BOOKINFO_|(DETAILS|REVIEWS|RATINGS|EXTERNAL_BOOK)_|.*_PROXY$", re.IGNORECASE)
ENDED = {0, -signal.SIGTERM}  # gunicorn exits; uvicorn raises the signal again once it is done
OURS = ("SERVICES_DOMAIN", "FLOOD_FACTOR", "ENABLE_RATINGS", "STAR_COLOR", "CLUSTER_NAME", "SERVICE_VERSION", "HOST")


def unavailable(service: str) -> dict[str, str]:
    return {"error": f"Sorry, product {service} are currently unavailable for this book."}


def sent(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), [("content-type", "application/json")])


def reviews_of(*ratings: dict[str, Any]) -> dict[str, Any]:
    given = [{"rating": rating} for rating in ratings] or [{}, {}]
    texts = [{"reviewer": f"Reviewer{n}", "text": f"text {n}", **each} for n, each in enumerate(given, 1)]
    return {"id": "0", "podname": "reviews-stub", "clustername": "", "reviews": texts}


class Service:
    """One of Bookinfo's processes, on a port of its own choice. `lines` is its access log."""

    def __init__(self, name: str, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if not FROM_OUTSIDE.match(k) and k not in OURS}
        self.process = subprocess.Popen(
            [sys.executable, SERVICES / f"{name}.py", "0"],
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**inherited, "BOOKINFO_MESH": "off", "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        found = re.search(r"listens on (?:http|grpc)://(\S+)", self.greeting)
        assert found, self.greeting
        self.address = found[1]
        self.client = httpx.Client(base_url=f"http://{self.address}", trust_env=False, timeout=15)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.client.post(path, **options)

    def next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            assert self.process.stdout is not None
            self.process.stdout.close()


class Upstream:
    """Stands for one of the services that are called: says what a test puts into `answer`."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.answer: Callable[[Received], Any] = lambda _: sent({})
        peer.answer = lambda received: self.answer(received)

    def settings(self, service: str) -> dict[str, str]:
        return {f"{service.upper()}_HOSTNAME": "127.0.0.1", f"{service.upper()}_SERVICE_PORT": str(self.peer.port)}

    @property
    def received(self) -> list[Received]:
        return self.peer.received


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Service]]:
    """Starts a service, once for all tests that want it with the same environment."""
    started: dict[Any, Service] = {}

    def start(name: str, **environment: str) -> Service:
        key = (name, *sorted(environment.items()))
        if key not in started:
            started[key] = Service(name, **environment)
        return started[key]

    yield start
    for service in started.values():  # all at once, and only then wait for each
        service.process.send_signal(signal.SIGTERM)
    codes = {key[0]: service.stop() for key, service in started.items()}
    assert set(codes.values()) <= ENDED, codes


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, Upstream]]:
    with contextlib.ExitStack() as stack:
        yield {name: Upstream(stack.enter_context(Peer())) for name in ("details", "reviews", "ratings", "books")}


@pytest.fixture
def upstream(peers: dict[str, Upstream]) -> dict[str, Upstream]:
    peers["details"].answer = lambda _: sent(DETAILS)
    peers["reviews"].answer = lambda _: sent(reviews_of())
    peers["ratings"].answer = lambda _: sent({"id": 0, "ratings": RATINGS})
    for each in peers.values():
        each.received.clear()
    return peers


@pytest.fixture
def productpage(run: Callable[..., Service], upstream: dict[str, Upstream]) -> Service:
    settings = {k: v for name in ("details", "reviews", "ratings") for k, v in upstream[name].settings(name).items()}
    service = run("productpage", **settings)
    service.client.cookies.clear()
    return service


def reviews_service(run: Callable[..., Service], upstream: dict[str, Upstream], version: str) -> Service:
    settings = {
        "v1": {},
        "v2": {"ENABLE_RATINGS": "true"},
        "v3": {"ENABLE_RATINGS": "true", "STAR_COLOR": "red"},
    }[version]
    return run("reviews", SERVICE_VERSION=version, **upstream["ratings"].settings("ratings"), **settings)


# details


def test_details_knows_one_book(run: Callable[..., Service]) -> None:
    """The payload of Istio's details.rb, field by field and in its order; the id is a number, and the one asked for."""
    answer = run("details").get("/details/0")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json().items()) == list(DETAILS.items())
    assert run("details").get("/details/7").json()["id"] == 7


def test_details_wants_a_number(run: Callable[..., Service]) -> None:
    """400 with an error, as details.rb says to what is no number."""
    for wrong in ("abc", "1x", "-1", "%C2%B2"):
        answer = run("details").get(f"/details/{wrong}")
        assert (answer.status_code, set(answer.json())) == (400, {"error"})


def volumes(**changed: Any) -> dict[str, Any]:
    info = {
        "authors": ["William Shakespeare"],
        "publishedDate": "2002",
        "printType": "BOOK",
        "pageCount": 90,
        "publisher": "Courier Corporation",
        "language": "en",
        "industryIdentifiers": [
            {"type": "ISBN_10", "identifier": "0486424618"},
            {"type": "ISBN_13", "identifier": "9780486424613"},
        ],
    }
    return {"items": [{"volumeInfo": {**info, **changed}}]}


def test_details_v2_asks_the_external_book_service(run: Callable[..., Service], upstream: dict[str, Upstream]) -> None:
    """By plain HTTP under DO_NOT_ENCRYPT, so that the mesh can originate TLS; what is of no use is 502."""
    books = upstream["books"]
    service = run(
        "details",
        ENABLE_EXTERNAL_BOOK_SERVICE="true",
        DO_NOT_ENCRYPT="true",
        EXTERNAL_BOOK_SERVICE_HOSTNAME=f"127.0.0.1:{books.peer.port}",
    )
    books.answer = lambda _: sent(volumes())
    assert service.get("/details/0").json() == {
        **DETAILS,
        "year": "2002",
        "pages": 90,
        "publisher": "Courier Corporation",
        "ISBN-10": "0486424618",
        "ISBN-13": "9780486424613",
    }
    assert books.received[0].target == "/books/v1/volumes?q=isbn%3A0486424618"
    no_use = (
        sent({}),
        sent([]),
        sent({"items": []}),
        sent(volumes(authors=[])),
        sent(volumes(industryIdentifiers=[1])),
    )
    for answer in (*no_use, Answer(500), Answer(body=b"<html>")):
        books.answer = lambda _, answer=answer: answer
        assert service.get("/details/0").status_code == 502


@pytest.mark.parametrize(
    ("service", "body"),
    [
        ("details", {"status": "Details is healthy"}),
        ("reviews", {"status": "Reviews is healthy"}),
        ("ratings", {"status": "Ratings is healthy"}),
        ("productpage", "Product page is healthy"),
    ],
)
def test_each_says_that_it_is_healthy(
    run: Callable[..., Service], upstream: dict[str, Upstream], productpage: Service, service: str, body: Any
) -> None:
    """In Istio's words, which readiness probes and dashboards look for."""
    running = {"productpage": lambda: productpage, "reviews": lambda: reviews_service(run, upstream, "v1")}
    answer = running.get(service, lambda: run(service))().get("/health")
    assert answer.status_code == 200
    assert (answer.text if service == "productpage" else answer.json()) == body


# ratings


def test_ratings_has_two_reviewers(run: Callable[..., Service]) -> None:
    """The id is a number here, and a string in reviews: Istio's services differ so."""
    answer = run("ratings").get("/ratings/0")
    assert (answer.status_code, answer.json()) == (200, {"id": 0, "ratings": RATINGS})


def test_ratings_stores_what_is_posted(run: Callable[..., Service]) -> None:
    """In memory, for that product only."""
    service = run("ratings")
    answer = service.post("/ratings/3", json={"Reviewer1": 1})
    assert (answer.status_code, answer.json()) == (200, {"id": 3, "ratings": {"Reviewer1": 1}})
    assert service.get("/ratings/3").json()["ratings"] == {"Reviewer1": 1}
    assert service.get("/ratings/0").json()["ratings"] == RATINGS


def test_ratings_refuses_what_is_none(run: Callable[..., Service]) -> None:
    """A bad id and a bad body are 400 with an error; nothing is stored."""
    service = run("ratings")
    for method, path, body in (
        ("GET", "/ratings/abc", b""),
        ("POST", "/ratings/abc", b"{}"),
        ("POST", "/ratings/0", b"no json"),
        ("POST", "/ratings/0", b"[1]"),
        ("POST", "/ratings/0", b'{"Reviewer1": "many"}'),
        ("POST", "/ratings/0", b"\xff"),
    ):
        answer = service.client.request(method, path, content=body)
        assert (answer.status_code, set(answer.json())) == (400, {"error"}), (method, path, body)
    assert service.get("/ratings/0").json()["ratings"] == RATINGS
    assert service.client.delete("/ratings/0").status_code == 405


def test_ratings_v2_reads_a_database(run: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> None:
    """An UPDATE shows in the next answer (Istio's task changes a star by SQL); a POST is not implemented."""
    file = tmp_path_factory.mktemp("ratings") / "ratings.sqlite"
    service = run("ratings", SERVICE_VERSION="v2", RATINGS_DATABASE=str(file))
    assert service.get("/ratings/0").json() == {"id": 0, "ratings": RATINGS}
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE ratings SET stars = 1 WHERE reviewer = 'Reviewer2'")
    assert service.get("/ratings/0").json()["ratings"] == {**RATINGS, "Reviewer2": 1}
    assert service.post("/ratings/0", json={"Reviewer1": 1}).status_code == 501
    file.unlink()
    assert service.get("/ratings/0").status_code == 500


def test_ratings_over_grpc_keep_what_is_put(run: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stars by another protocol; its log has a line for each call, too."""
    monkeypatch.syspath_prepend(str(SERVICES))
    api = importlib.import_module("ratings_api")
    service = run("ratings_grpc")
    with grpc.insecure_channel(service.address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = api.RatingsStub(channel)
        assert dict(stub.Get(api.RatingsRequest(product_id=0), timeout=15).stars) == RATINGS
        stub.Put(api.ProductRatings(product_id=3, stars={"Reviewer1": 1}), timeout=15)
        assert dict(stub.Get(api.RatingsRequest(product_id=3), timeout=15).stars) == {"Reviewer1": 1}
        with pytest.raises(grpc.RpcError, match="1 to 5 stars"):
            stub.Put(api.ProductRatings(product_id=3, stars={"Reviewer1": 6}), timeout=15)
    assert service.next_line().startswith("ratings-grpc-v1 POST /bookinfo.Ratings/Get 200 ")


def test_reviews_may_ask_ratings_over_grpc(run: Callable[..., Service]) -> None:
    """RATINGS_PROTOCOL=grpc; without ratings there are reviews all the same."""
    host, _, port = run("ratings_grpc").address.rpartition(":")
    told = {"RATINGS_PROTOCOL": "grpc", "ENABLE_RATINGS": "true", "RATINGS_GRPC_HOSTNAME": host}
    stars = [
        each["rating"]
        for each in run("reviews", RATINGS_GRPC_SERVICE_PORT=port, **told).get("/reviews/0").json()["reviews"]
    ]
    assert stars == [{"stars": 5, "color": "black"}, {"stars": 4, "color": "black"}]
    nobody = run("reviews", RATINGS_GRPC_SERVICE_PORT=str(refusing_port()), **told)
    assert [each["rating"] for each in nobody.get("/reviews/0").json()["reviews"]] == [{"error": NO_RATINGS}] * 2


def test_ratings_v_faulty_fails_half_of_the_time(run: Callable[..., Service]) -> None:
    """200 draws, p = 1/2: outside 60..140 once in ten million runs. Its health check does not fail."""
    service = run("ratings", SERVICE_VERSION="v-faulty")
    statuses = [service.get("/ratings/0").status_code for _ in range(200)]
    assert set(statuses) == {200, 503}
    assert 60 <= statuses.count(503) <= 140
    assert service.get("/health").status_code == 200


def test_ratings_other_versions_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """v-delayed takes 7 s half of the time; v-unavailable flips each minute, v-unhealthy each quarter of an hour, with
    its health check."""
    monkeypatch.syspath_prepend(str(SERVICES))
    mood = importlib.import_module("ratings").mood
    assert {mood("v-delayed", 0, draw).delay for draw in (0.0, 0.49, 0.5, 0.99)} == {0.0, 7.0}
    assert [mood("v-unavailable", at, 0).is_available for at in (0, 59, 60, 119, 120)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert all(mood("v-unavailable", at, 0).is_healthy for at in (0, 60))
    for at, well in ((0, True), (899, True), (900, False), (1799, False), (1800, True)):
        assert mood("v-unhealthy", at, 0)[:2] == (well, well)
    assert mood("v1", 10**6, 0.99) == (True, True, 0.0)


def test_answers_do_not_wait_for_acknowledgements(
    run: Callable[..., Service], upstream: dict[str, Upstream], productpage: Service
) -> None:
    """Nagle's algorithm against delayed acknowledgements costs 40 ms a request, which no mesh could make good."""
    for service in (run("ratings"), run("details"), reviews_service(run, upstream, "v1"), productpage):
        durations = [service.get("/health").elapsed.total_seconds() for _ in range(31)]
        assert sorted(durations)[len(durations) // 2] < 0.03, (service.greeting, durations)


# reviews


def test_reviews_v1_has_no_ratings(run: Callable[..., Service], upstream: dict[str, Upstream]) -> None:
    """No key `rating` at all, and nobody calls ratings; the id is a string."""
    answer = reviews_service(run, upstream, "v1").get("/reviews/0")
    assert answer.status_code == 200
    assert set(answer.json()) == {"id", "podname", "clustername", "reviews"}
    assert answer.json()["id"] == "0"
    assert [set(each) for each in answer.json()["reviews"]] == [{"reviewer", "text"}] * 2
    assert [each["reviewer"] for each in answer.json()["reviews"]] == ["Reviewer1", "Reviewer2"]
    assert not upstream["ratings"].received


@pytest.mark.parametrize(("version", "colour"), [("v2", "black"), ("v3", "red")])
def test_reviews_with_ratings_have_stars_of_their_colour(
    run: Callable[..., Service], upstream: dict[str, Upstream], version: str, colour: str
) -> None:
    """ENABLE_RATINGS and STAR_COLOR make v2 and v3 out of one program; ratings is asked for the same product."""
    answer = reviews_service(run, upstream, version).get("/reviews/4")
    assert [each["rating"] for each in answer.json()["reviews"]] == [
        {"stars": 5, "color": colour},
        {"stars": 4, "color": colour},
    ]
    assert [each.target for each in upstream["ratings"].received] == ["/ratings/4"]


@pytest.mark.parametrize(
    "answer",
    [Answer(500), Answer(503), Answer(404), Answer(body=b"<html>"), sent({}), sent([]), Answer(drop=True)],
    ids=["500", "503", "404", "no JSON", "no ratings", "no mapping", "dropped"],
)
def test_reviews_do_without_ratings_that_fail(
    run: Callable[..., Service], upstream: dict[str, Upstream], answer: Answer
) -> None:
    """200 all the same, with Istio's sentence in place of the stars."""
    upstream["ratings"].answer = lambda _: answer
    found = reviews_service(run, upstream, "v2").get("/reviews/0")
    assert found.status_code == 200
    assert [each["rating"] for each in found.json()["reviews"]] == [{"error": NO_RATINGS}] * 2


def test_a_reviewer_without_a_rating_has_the_error_alone(
    run: Callable[..., Service], upstream: dict[str, Upstream]
) -> None:
    """The other's stars stay."""
    upstream["ratings"].answer = lambda _: sent({"id": 0, "ratings": {"Reviewer2": 2}})
    found = reviews_service(run, upstream, "v2").get("/reviews/0").json()["reviews"]
    assert [each["rating"] for each in found] == [{"error": NO_RATINGS}, {"stars": 2, "color": "black"}]


def test_reviews_v3_waits_less_than_v2(run: Callable[..., Service], upstream: dict[str, Upstream]) -> None:
    """v2 outwaits productpage's 3 s (10 s: the tutorial's bug), v3 gives up after 2.5 s: the tutorial's fix."""

    async def late(_: Received) -> Answer:
        await asyncio.sleep(3.1)
        return sent({"id": 0, "ratings": RATINGS})

    upstream["ratings"].answer = late
    v2, v3 = (reviews_service(run, upstream, version) for version in ("v2", "v3"))

    def timed(service: Service) -> tuple[dict[str, Any], float]:
        began = time.monotonic()
        found = service.get("/reviews/0").json()["reviews"][0]["rating"]
        return found, time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor() as pool:
        patient, brief = pool.map(timed, (v2, v3))
    assert patient[0] == {"stars": 5, "color": "black"}
    assert brief[0] == {"error": NO_RATINGS}
    assert 2.4 < brief[1] < 3.1


def test_reviews_say_which_pod_they_are_of(run: Callable[..., Service], upstream: dict[str, Upstream]) -> None:
    """HOSTNAME and CLUSTER_NAME, which Kubernetes and Istio's multicluster sample set."""
    found = run("reviews", HOSTNAME="reviews-v1-abc", CLUSTER_NAME="west").get("/reviews/0").json()
    assert (found["podname"], found["clustername"]) == ("reviews-v1-abc", "west")


# productpage


def test_productpage_serves_its_pages(productpage: Service) -> None:
    """The front page leads to the product page."""
    for path in ("/", "/index.html"):
        answer = productpage.get(path)
        assert (answer.status_code, "/productpage" in answer.text) == (200, True)
    assert productpage.get("/static/bookinfo.css").status_code == 200


def test_productpage_shows_details_and_reviews(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """The title, every detail, every review."""
    page = productpage.get("/productpage")
    assert page.status_code == 200
    for text in ("The Comedy of Errors", "William Shakespeare", "PublisherA", "123-1234567890", "text 1", "text 2"):
        assert text in page.text
    assert "★" not in page.text
    assert [each.target for each in upstream["details"].received] == ["/details/0"]
    assert [each.target for each in upstream["reviews"].received] == ["/reviews/0"]


@pytest.mark.parametrize("colour", ["black", "red"])
def test_productpage_shows_stars_in_their_colour(
    productpage: Service, upstream: dict[str, Upstream], colour: str
) -> None:
    """As many as were given, out of five."""
    given = reviews_of({"stars": 5, "color": colour}, {"stars": 2, "color": colour})
    upstream["reviews"].answer = lambda _: sent(given)
    page = productpage.get("/productpage").text
    assert page.count(f"color: {colour}") == 2
    assert "★★★★★<" in page
    assert "★★☆☆☆<" in page


def test_productpage_shows_that_ratings_fail(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """reviews' sentence reaches the page, the review stays."""
    upstream["reviews"].answer = lambda _: sent(reviews_of({"error": NO_RATINGS}, {"error": NO_RATINGS}))
    page = productpage.get("/productpage").text
    assert page.count(NO_RATINGS) == 2
    assert "text 1" in page


def test_productpage_escapes_what_services_say(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """A review is text, whatever its author typed; a colour that is no word is no style."""
    bad = reviews_of({"stars": 1, "color": "red;background:url(//evil)"})
    bad["reviews"][0]["text"] = "<script>alert(1)</script>"
    upstream["reviews"].answer = lambda _: sent(bad)
    page = productpage.get("/productpage").text
    assert "<script>" not in page
    assert "evil" not in page


def test_the_page_says_what_is_missing(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """Istio's headlines and sentences; the page itself is 200. reviews is tried twice, details once."""
    upstream["details"].answer = upstream["reviews"].answer = lambda _: Answer(503)
    page = productpage.get("/productpage")
    assert page.status_code == 200
    for service in ("details", "reviews"):
        assert f"Error fetching product {service}!" in page.text
        assert unavailable(service)["error"] in page.text
    assert (len(upstream["details"].received), len(upstream["reviews"].received)) == (1, 2)


def test_a_second_try_that_works_is_a_success(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """The loop is there to mend what a single 503 breaks."""
    upstream["reviews"].answer = lambda _: Answer(503) if len(upstream["reviews"].received) == 1 else sent(reviews_of())
    assert "text 1" in productpage.get("/productpage").text
    assert len(upstream["reviews"].received) == 2


def test_reviews_that_hang_cost_twice_three_seconds(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """The bug that fault injection brings to light: 3 s, once more, and no reviews after 6."""
    upstream["reviews"].answer = lambda _: Answer(gate=asyncio.sleep(20))
    began = time.monotonic()
    page = productpage.get("/productpage").text
    assert 5.8 < time.monotonic() - began < within(7.5)
    assert unavailable("reviews")["error"] in page
    assert len(upstream["reviews"].received) == 2


def test_the_api_lists_products(productpage: Service) -> None:
    """One, and its id is a number."""
    (product,) = productpage.get("/api/v1/products").json()
    assert set(product) == {"id", "title", "descriptionHtml"}
    assert (product["id"], product["title"]) == (0, "The Comedy of Errors")


def test_the_api_hands_on_what_services_say(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """details, reviews and ratings of the product that was asked for."""
    assert productpage.get("/api/v1/products/2").json() == DETAILS
    assert productpage.get("/api/v1/products/2/reviews").json() == reviews_of()
    assert productpage.get("/api/v1/products/2/ratings").json() == {"id": 0, "ratings": RATINGS}
    assert {name: upstream[name].received[0].target for name in ("details", "reviews", "ratings")} == {
        "details": "/details/2",
        "reviews": "/reviews/2",
        "ratings": "/ratings/2",
    }


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_the_api_hands_on_the_status_of_a_failure(
    productpage: Service, upstream: dict[str, Upstream], status: int
) -> None:
    """With Istio's sentence for each service."""
    for name, path in (("details", ""), ("reviews", "/reviews"), ("ratings", "/ratings")):
        upstream[name].answer = lambda _: Answer(status)
        answer = productpage.get(f"/api/v1/products/0{path}")
        assert (answer.status_code, answer.json()) == (status, unavailable(name))


def test_a_service_that_gives_no_answer_is_500(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """No status to hand on: refused, cut off, or a 200 that is no JSON."""
    for answer in (Answer(drop=True), Answer(body=b"<html>")):
        upstream["details"].answer = lambda _, answer=answer: answer
        found = productpage.get("/api/v1/products/0")
        assert (found.status_code, found.json()) == (500, unavailable("details"))


def test_an_id_can_not_change_the_path(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """It is quoted again on its way upstream."""
    upstream["details"].answer = lambda _: Answer(400)
    productpage.get("/api/v1/products/..%3Fx=1")
    assert [each.target for each in upstream["details"].received] == ["/details/..%3Fx%3D1"]


def test_jason_signs_in_and_out(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """No password is checked. From then on each call for this browser carries `end-user`; after /logout none does."""
    answer = productpage.post("/login", data={"username": "jason", "passwd": "any"})
    assert (answer.status_code, answer.headers["location"]) == (302, "/productpage")
    assert "HttpOnly" in answer.headers["set-cookie"]
    page = productpage.get("/productpage").text
    assert "Signed in as <b>jason</b>" in page
    for name in ("details", "reviews"):
        assert upstream[name].received[-1].header("end-user") == "jason"
    answer = productpage.get("/logout")
    assert (answer.status_code, answer.headers["location"]) == (302, "/productpage")
    assert "Signed in" not in productpage.get("/productpage").text
    for name in ("details", "reviews"):
        assert upstream[name].received[-1].header("end-user") is None


def test_the_api_carries_the_user_too(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """Version-by-user rules hold for it as for the page."""
    productpage.post("/login", data={"username": "jason"})
    productpage.get("/api/v1/products/0/reviews")
    assert upstream["reviews"].received[-1].header("end-user") == "jason"


def test_a_forged_session_is_nobody(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """The cookie is signed: only /login makes a jason."""
    productpage.get("/productpage", headers={"cookie": "bookinfo=eyJ1c2VyIjoiamFzb24ifQ.aaaaaa.bbbbbbbbbbbb"})
    assert upstream["reviews"].received[-1].header("end-user") is None


@pytest.mark.parametrize("name", ["a\r\nx-evil: 1", "ünal", "x" * 65])
def test_a_name_that_is_no_header_is_refused(productpage: Service, name: str) -> None:
    """It would travel in one."""
    assert productpage.post("/login", data={"username": name}).status_code == 400


def test_productpage_counts_results(productpage: Service, upstream: dict[str, Upstream]) -> None:
    """Istio's request_result, by destination and code, in Prometheus' text format."""

    def count() -> int:
        found = re.search(
            r'^request_result_total\{destination_app="ratings",response_code="418"\} (\d+)$',
            productpage.get("/metrics").text,
            re.MULTILINE,
        )
        return int(found[1]) if found else 0

    upstream["ratings"].answer = lambda _: Answer(418)
    before = count()
    productpage.get("/api/v1/products/0/ratings")
    assert count() == before + 1


def test_flood_factor_asks_reviews_more_often(run: Callable[..., Service], upstream: dict[str, Upstream]) -> None:
    """FLOOD_FACTOR=5: five more calls for each page, with the user's header; the page has its own answer."""
    service = run(
        "productpage",
        FLOOD_FACTOR="5",
        **upstream["details"].settings("details"),
        **upstream["reviews"].settings("reviews"),
    )
    service.post("/login", data={"username": "jason"})
    assert "text 1" in service.get("/productpage").text
    assert [each.header("end-user") for each in upstream["reviews"].received] == ["jason"] * 6


def test_services_domain_is_appended(run: Callable[..., Service], upstream: dict[str, Upstream]) -> None:
    """SERVICES_DOMAIN=localhost and DETAILS_HOSTNAME=details: details.localhost, which is this machine (RFC 6761) or
    unknown, but never `details`."""
    settings = {
        **upstream["details"].settings("details"),
        "DETAILS_HOSTNAME": "details",
        "SERVICES_DOMAIN": "localhost",
    }
    code = "import bookinfo_mesh as b; print(b.base_url('details'), b.base_url('reviews'))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SERVICES,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    port = upstream["details"].peer.port
    assert found.stdout.split() == [f"http://details.localhost:{port}", "http://reviews.localhost:9080"]


def test_upstreams_that_refuse_are_an_answer(run: Callable[..., Service]) -> None:
    """Nobody listens there: 500 at once, not a stack trace."""
    closed = {f"{name}_{part}": value for name in ("DETAILS", "REVIEWS", "RATINGS")
              for part, value in (("HOSTNAME", "127.0.0.1"), ("SERVICE_PORT", str(refusing_port())))}  # fmt: skip
    service = run("productpage", **closed)
    answer = service.get("/api/v1/products/0/reviews")
    assert (answer.status_code, answer.json()) == (500, unavailable("reviews"))
    assert unavailable("details")["error"] in service.get("/productpage").text


# all of them


@pytest.mark.parametrize("name", ["details", "ratings"])
def test_a_service_logs_and_ends_on_sigterm(name: str) -> None:
    """One line says where it listens, one line follows for each request, and SIGTERM ends it in time."""
    service = Service(name, SERVICE_VERSION="v9")
    try:
        assert service.greeting.startswith(f"{name}-v9 listens on http://127.0.0.1:")
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        service.get(
            f"/{name}/0?x=1",
            headers={"host": f"{name}:9080", "end-user": "jason", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
        )
        assert re.fullmatch(
            rf"{name}-v9 GET /{name}/0 200 \d+ms host={name}:9080 user=jason trace={trace}", service.next_line()
        )
        service.get("/%0Aforged")
        assert re.fullmatch(rf"{name}-v9 GET /%0Aforged 404 .*", service.next_line())
    finally:
        assert service.stop() in ENDED
