"""What does a process see that has name servers and nothing else?"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import httpx
import pytest

import meshlib
from discovery.feed import Feed, hosts
from discovery.name_server import NameServer
from meshlib.discovery.dns import MAX_ALIASES, DnsSource
from meshlib.errors import SettingsError
from meshlib.model import Snapshot
from peers import Answer, Peer


@pytest.fixture
def server() -> Iterator[NameServer]:
    with NameServer() as server:
        yield server


@pytest.fixture
def feed(server: NameServer, tmp_path: Path) -> Iterator[Feed]:
    """Its resolv.conf has two search domains and ndots 2."""
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\nsearch shop.svc.test svc.test\noptions ndots:2 timeout:1\n")
    with Feed(DnsSource(server.address, resolv_conf=conf)) as feed:
        yield feed


def addresses(snapshot: Snapshot) -> list[str]:
    return [each.authority for assignment in snapshot.assignments for each in assignment.endpoints]


def ask(feed: Feed, authority: str) -> Snapshot:
    """The first Snapshot that says anything of it."""
    feed.source.want(authority)
    return feed.wait_for(lambda snapshot: authority in (*hosts(snapshot), *snapshot.absent))


def test_a_host_is_its_addresses(server: NameServer, feed: Feed) -> None:
    """IPv6 only where there is no IPv4: a pod that has both would count twice."""
    server.set("a.b.test. 60 A 10.0.0.1", "a.b.test. 60 A 10.0.0.2", "a.b.test. 60 AAAA ::1", "c.b.test. 60 AAAA ::2")
    snapshot = ask(feed, "a.b.test:80")
    assert addresses(snapshot) == ["10.0.0.1:80", "10.0.0.2:80"]
    assert snapshot.inconsistencies() == ()
    assert not snapshot.complete
    assert "[::2]:90" in addresses(ask(feed, "c.b.test:90"))


def test_services_say_ports_priorities_and_weights(server: NameServer, feed: Feed) -> None:
    """Priorities have no gaps in a Snapshot; a weight of 0 still gets a little."""
    server.set(
        "_http._tcp.a.test. 60 SRV 10 3 8080 one.test.",
        "_http._tcp.a.test. 60 SRV 20 0 8081 two.test.",
        "one.test. 60 A 10.0.0.1",
        "two.test. 60 A 10.0.0.2",
        "_none._tcp.a.test. 60 SRV 0 0 0 .",
    )
    (assignment,) = ask(feed, "_http._tcp.a.test:80").assignments
    found = [(each.authority, each.priority, each.weight) for each in assignment.endpoints]
    assert found == [("10.0.0.1:8080", 0, 3), ("10.0.0.2:8081", 1, 1)]
    assert "_none._tcp.a.test:80" in ask(feed, "_none._tcp.a.test:80").absent


def test_search_domains_come_first_for_names_with_few_dots(server: NameServer, feed: Feed) -> None:
    """In their order; a name with a dot at its end is what it is."""
    server.set("reviews.svc.test. 60 A 10.0.0.1", "reviews. 60 A 10.0.0.9", "a.b.c. 60 A 10.0.0.3")
    assert addresses(ask(feed, "reviews:80")) == ["10.0.0.1:80"]
    assert [name for name, *_ in server.asked] == ["reviews.shop.svc.test.", "reviews.svc.test."]
    assert "10.0.0.9:80" in addresses(ask(feed, "reviews.:80"))
    server.asked.clear()
    assert "10.0.0.3:80" in addresses(ask(feed, "a.b.c:80"))
    assert [name for name, *_ in server.asked] == ["a.b.c."]


def of_conf(server: NameServer, folder: Path, text: str) -> DnsSource:
    (folder / "resolv.conf").write_text(f"nameserver 127.0.0.1\nsearch shop.svc.test svc.test test\n{text}\n")
    return DnsSource(server.address, resolv_conf=folder / "resolv.conf")


def names_asked(server: NameServer, source: DnsSource, host: str) -> list[str]:
    """For a name that there is not: all that it may mean."""
    with Feed(source) as feed:
        assert f"{host}:80" in ask(feed, f"{host}:80").absent
    return list(dict.fromkeys(name for name, *_ in server.asked))


@pytest.mark.parametrize(
    ("options", "host", "first"),
    [
        ("ndots:5", "reviews", "search"),
        ("ndots:5", "reviews.shop.svc.cluster.local", "search"),
        ("ndots:5", "a.reviews.shop.svc.cluster.local", "itself"),
        ("ndots:5", "reviews.shop.svc.cluster.local.", "alone"),
        ("ndots:5", "reviews.", "alone"),
        ("ndots:1", "reviews", "search"),
        ("ndots:1", "a.example", "itself"),
        ("ndots:0", "reviews", "itself"),
        ("ndots:5\noptions ndots:2", "a.b.example", "itself"),
        ("", "reviews", "search"),
        ("", "a.example", "itself"),
    ],
)
def test_ndots_says_which_name_is_tried_first(
    server: NameServer, tmp_path: Path, options: str, host: str, first: str
) -> None:
    """Kubernetes gives pods ndots:5, by which a whole name of a Service is looked for below the search domains first.
    With a dot at its end it is absolute, and asked for alone."""
    asked = names_asked(server, of_conf(server, tmp_path, f"options {options}" if options else ""), host)
    below = [f"{host}.{domain}." for domain in ("shop.svc.test", "svc.test", "test")]
    expected = {"search": [*below, f"{host}."], "itself": [f"{host}.", *below], "alone": [host]}
    assert asked == expected[first]


@pytest.mark.parametrize(
    ("options", "timeout", "lifetime", "rotates"),
    [
        ("", 2.0, 5.0, False),
        ("rotate", 2.0, 5.0, True),
        ("timeout:1", 1.0, 2.0, False),
        ("timeout:3 attempts:4", 3.0, 12.0, False),
        ("attempts:1", 2.0, 2.0, False),
        ("timeout:90 attempts:9", 30.0, 30.0, False),
        ("timeout:x attempts:y", 2.0, 5.0, False),
    ],
)
def test_timeout_attempts_and_rotate_are_those_of_resolv_conf(
    server: NameServer, tmp_path: Path, options: str, timeout: float, lifetime: float, rotates: bool
) -> None:
    """Seconds for one question to one server, and for all of them together."""
    resolver = of_conf(server, tmp_path, f"options {options}" if options else "")._make_resolver()
    assert (resolver.timeout, resolver.lifetime, resolver.rotate) == (timeout, lifetime, rotates)


def test_a_silent_name_server_is_asked_again_after_its_timeout(server: NameServer, tmp_path: Path) -> None:
    """Not earlier; and its first answer counts."""
    server.answer = lambda question, by_tcp: []
    with Feed(of_conf(server, tmp_path, "options timeout:1 attempts:2")) as feed:
        began = time.monotonic()
        feed.source.want("a.b.test:80")
        server.wait_for(lambda asked: len(asked) >= 2)
        assert time.monotonic() - began >= 0.9  # the first one had its second
        server.set("a.b.test. 60 A 10.0.0.1")
        server.answer = server.by_zone
        feed.wait_for(lambda snapshot: addresses(snapshot) == ["10.0.0.1:80"], 30)


def test_no_such_name_is_absent_and_is_not_asked_for_again_on_a_call(server: NameServer, feed: Feed) -> None:
    """Until its negative TTL ends; a call on it goes where it would go without us."""
    assert ask(feed, "none.b.test:80").absent == ("none.b.test:80",)
    count = len(server.asked)
    feed.source.want("none.b.test:80")
    server.set("a.b.test. 60 A 10.0.0.1")
    ask(feed, "a.b.test:80")
    assert len(server.asked) == count + 1


def test_addresses_are_no_names(server: NameServer, feed: Feed) -> None:
    """And cost no question."""
    for authority in ("127.0.0.1:80", "[::1]:80", f"{'a' * 64}.test:80"):
        assert authority in ask(feed, authority).absent
    assert server.asked == []


def test_new_records_are_used_within_a_ttl(server: NameServer, feed: Feed) -> None:
    """And a name that has come to be as well as one that has gone."""
    server.set("a.b.test. 1 A 10.0.0.1")
    ask(feed, "a.b.test:80")
    server.set("a.b.test. 1 A 10.0.0.2")
    feed.wait_for(lambda snapshot: addresses(snapshot) == ["10.0.0.2:80"])
    server.set()
    feed.wait_for(lambda snapshot: snapshot.absent == ("a.b.test:80",))


def test_what_was_known_stays_while_the_name_server_fails(
    server: NameServer, feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    """SERVFAIL, then silence. It is logged once, and the first good answer counts."""
    server.set("a.b.test. 1 A 10.0.0.1")
    ask(feed, "a.b.test:80")
    with caplog.at_level(logging.WARNING, "meshlib.discovery"):
        server.fail(dns.rcode.SERVFAIL)
        server.asked.clear()
        server.wait_for(lambda asked: len(asked) > 2)
        server.answer = lambda question, by_tcp: []
        server.asked.clear()
        server.wait_for(lambda asked: asked)
    assert addresses(feed.snapshot) == ["10.0.0.1:80"]
    assert len([each for each in caplog.records if "stays" in each.getMessage()]) == 1
    server.set("a.b.test. 1 A 10.0.0.2")
    server.answer = server.by_zone
    feed.wait_for(lambda snapshot: addresses(snapshot) == ["10.0.0.2:80"], 30)


def test_a_failure_below_a_search_domain_does_not_lead_to_another_name(server: NameServer, feed: Feed) -> None:
    """`reviews` of another namespace is another service."""

    def answer(question: dns.message.QueryMessage, by_tcp: bool) -> list[bytes]:
        reply = server.reply(question)
        if question.question[0].name.to_text() == "reviews.shop.svc.test.":
            reply.set_rcode(dns.rcode.SERVFAIL)
        return [reply.to_wire()]

    server.set("reviews.svc.test. 60 A 10.0.0.6", "a.b.test. 60 A 10.0.0.1")
    server.answer = answer
    feed.source.want("reviews:80")
    server.wait_for(lambda asked: len(asked) >= 2)
    ask(feed, "a.b.test:80")
    assert hosts(feed.snapshot) == ["a.b.test:80"]


def test_a_truncated_answer_is_asked_for_by_tcp(server: NameServer, feed: Feed) -> None:
    """The datagram's own records, which are some of many, don't count."""

    def answer(question: dns.message.QueryMessage, by_tcp: bool) -> list[bytes]:
        reply = server.reply(question)
        if not by_tcp:
            reply.flags |= dns.flags.TC
            reply.answer = []
        return [reply.to_wire()]

    server.set(*(f"a.b.test. 60 A 10.0.{number}.1" for number in range(200)))
    server.answer = answer
    assert len(addresses(ask(feed, "a.b.test:80"))) == 200
    assert [by_tcp for *_, by_tcp in server.asked] == [False, True]


def test_an_answer_that_was_not_asked_for_does_not_count(server: NameServer, feed: Feed) -> None:
    """Another id, and another question: the true answer behind them is taken."""

    def answer(question: dns.message.QueryMessage, by_tcp: bool) -> list[bytes]:
        true = server.reply(question)
        forged = server.reply(question)
        forged.answer = [dns.rrset.from_text("a.b.test.", 60, "IN", "A", "6.6.6.6")]
        forged.id = (question.id + 1) % 65536
        other = dns.message.make_query("other.test.", "A", id=question.id)
        return [forged.to_wire(), dns.message.make_response(other).to_wire(), b"nonsense", true.to_wire()]

    server.set("a.b.test. 60 A 10.0.0.1")
    server.answer = answer
    assert addresses(ask(feed, "a.b.test:80")) == ["10.0.0.1:80"]


def test_an_answer_from_another_source_does_not_count(server: NameServer, feed: Feed) -> None:
    """The right id, the right question, and before the true one: only where it comes from gives it away."""

    def forged(question: dns.message.QueryMessage) -> bytes:
        reply = dns.message.make_response(question)
        reply.answer = [dns.rrset.from_text(question.question[0].name, 60, "IN", "A", "6.6.6.6")]
        return reply.to_wire()

    server.set("a.b.test. 60 A 10.0.0.1")
    server.spoof = forged
    assert addresses(ask(feed, "a.b.test:80")) == ["10.0.0.1:80"]
    assert server.spoofed


def test_aliases_are_followed_and_circles_left(
    server: NameServer, feed: Feed, caplog: pytest.LogCaptureFixture
) -> None:
    """The shortest TTL of the chain counts."""
    server.set(
        "a.b.test. 1 CNAME c.b.test.",
        "c.b.test. 60 A 10.0.0.1",
        "x.b.test. 60 CNAME y.b.test.",
        "y.b.test. 60 CNAME x.b.test.",
    )
    assert addresses(ask(feed, "a.b.test:80")) == ["10.0.0.1:80"]
    server.asked.clear()
    feed.source.want("x.b.test:80")
    server.wait_for(lambda asked: len([name for name, *_ in asked if name[0] in "xy"]) >= MAX_ALIASES)
    server.set("a.b.test. 1 CNAME d.b.test.", "d.b.test. 60 A 10.0.0.2")
    assert addresses(feed.wait_for(lambda snapshot: addresses(snapshot) != ["10.0.0.1:80"])) == ["10.0.0.2:80"]
    assert any("in a circle" in record.getMessage() for record in caplog.records)


def test_stop_before_run_ends_it_at_once() -> None:
    """As when a Mesh is closed while it starts."""
    source = DnsSource(("127.0.0.1", 9))
    source.stop()
    source.run(lambda snapshot: None)


def test_records_change_under_load_without_a_failed_call(server: NameServer) -> None:
    """meshlib.connect("dns:"): the new pod gets the calls once its record is there, and the old one may go."""

    def named(name: bytes) -> Peer:
        return Peer(lambda received: Answer(200, name))

    with named(b"new") as new, ExitStack() as until_gone:
        old = until_gone.enter_context(named(b"old"))
        server.set(f"_http._tcp.a.test. 1 SRV 0 1 {old.port} pod.test.", "pod.test. 1 A 127.0.0.1")
        with (
            meshlib.connect(f"dns:127.0.0.1:{server.port}", telemetry="off") as mesh,
            httpx.Client(transport=mesh.transport()) as client,
        ):
            assert client.get("http://_http._tcp.a.test./").text == "old"
            server.set(f"_http._tcp.a.test. 1 SRV 0 1 {new.port} pod.test.", "pod.test. 1 A 127.0.0.1")
            deadline = time.monotonic() + 10
            while (response := client.get("http://_http._tcp.a.test./")).text != "new":
                assert response.status_code == 200
                assert time.monotonic() < deadline
            until_gone.close()
            assert {client.get("http://_http._tcp.a.test./").text for _ in range(20)} == {"new"}


def test_a_name_server_that_says_nothing_holds_a_call_up_once(server: NameServer) -> None:
    """For `resolve_timeout`; then it goes where it would go without us."""
    server.answer = lambda question, by_tcp: []
    with (
        Peer() as peer,
        meshlib.connect(f"dns:127.0.0.1:{server.port}", telemetry="off", resolve_timeout=0.2) as mesh,
        httpx.Client(transport=mesh.transport()) as client,
    ):
        began = time.monotonic()
        assert client.get(f"http://localhost:{peer.port}/").status_code == 200
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("server", ["dns:nonsense", "dns:127.0.0.1:0"])
def test_a_name_server_is_an_address(server: str) -> None:
    """Said when the feed starts."""
    with meshlib.connect(server, telemetry="off") as mesh, pytest.raises(SettingsError, match="host:port"):
        mesh.start()
