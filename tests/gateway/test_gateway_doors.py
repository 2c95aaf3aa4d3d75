"""Doors follow the configuration: they open, change, close and shake hands without harming who is inside."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import socket
import ssl
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trustme
from gateways import (
    PORT,
    address,
    configured,
    everything_to,
    gateway,
    hosts,
    listener,
    raw,
    reconfigure,
    secured,
    url,
)
from hypothesis import given
from hypothesis import strategies as st

from meshlib.gateway import doors, secrets, tls
from meshlib.gateway.hello import NoHello
from meshlib.gateway.hello import server_name as hello_name
from meshlib.gateway.limits import Limits
from meshlib.model import DirectResponse, Snapshot
from peers import Answer, Peer, Received
from snapshots import forward, route

REFUSED = (ssl.SSLError, ConnectionError)
"""How a client sees a handshake that the gateway does not want: asyncio may close before OpenSSL's alert has gone."""


class Slow:
    """An upstream whose answer waits until it is let go."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.asked, self.release = asyncio.Event(), asyncio.Event()

    async def __call__(self, _: Received) -> Answer:
        self._loop.call_soon_threadsafe(self.asked.set)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.release.wait(), self._loop))
        return Answer(body=b"at last")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class Pair:
    """Certificate files of one name, as a credential mounted in a folder."""

    def __init__(self, folder: Path, authority: trustme.CA, name: str) -> None:
        self.certificate, self.key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        self.renew(authority, name)

    def renew(self, authority: trustme.CA, *names: str) -> None:
        issued = authority.issue_cert(*names)
        issued.private_key_pem.write_to_path(self.key)
        Path(self.certificate).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    def spoil(self) -> None:
        Path(self.key).write_text("no key")

    def remove(self) -> None:
        Path(self.key).unlink()


def said(text: str, name: str = "http.8080", host: str = "*"):
    return hosts(name, {host: [route(DirectResponse(200, text.encode()))]})


# Opening and closing


async def test_listeners_come_and_go_with_the_configuration() -> None:
    """A new one opens, one that is gone refuses, the one that stays keeps its port and its connections."""
    two = configured([listener(1), listener(2)], [said("one", "http.1"), said("two", "http.2")], {})
    async with gateway(two, ports={1: 0, 2: 0, 3: 0}) as made, raw(made, 1) as kept:
        before = dict(made.addresses)
        await kept.send("GET / HTTP/1.1", "Host: a")
        assert (await kept.response())[2] == b"one"
        await reconfigure(
            made, configured([listener(1), listener(3)], [said("new one", "http.1"), said("three", "http.3")], {})
        )
        assert set(made.addresses) == {"0.0.0.0_1", "0.0.0.0_3"}
        assert made.addresses["0.0.0.0_1"] == before["0.0.0.0_1"]
        await kept.send("GET / HTTP/1.1", "Host: a")
        assert (await kept.response())[2] == b"new one"
        async with httpx.AsyncClient() as client:
            assert (await client.get(url(made, port=3))).text == "three"
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*before["0.0.0.0_2"])


async def test_closing_a_listener_lets_requests_in_flight_finish() -> None:
    """The answer arrives in full and says that the connection ends; idle connections just end."""
    slow = Slow()
    with Peer(slow) as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as busy, raw(made) as idle:
            await busy.send("GET / HTTP/1.1", "Host: a")
            await slow.asked.wait()
            await reconfigure(made, Snapshot("2", complete=True))
            assert made.addresses == {}
            assert await idle.rest() == b""
            slow.release.set()
            status, headers, body = await busy.response()
            assert (status, body, headers["connection"]) == (200, b"at last", "close")
            assert await busy.rest() == b""


async def test_changing_routes_harms_no_request_in_flight() -> None:
    """The call that began under the old routes ends under them; the next one on that connection sees the new ones."""
    slow = Slow()
    with Peer(slow) as peer:
        async with gateway(everything_to(peer.address)) as made, raw(made) as client:
            await client.send("GET / HTTP/1.1", "Host: a")
            await slow.asked.wait()
            await reconfigure(made, configured([listener()], [said("new")], {}))
            slow.release.set()
            assert (await client.response())[2] == b"at last"
            await client.send("GET / HTTP/1.1", "Host: a")
            assert (await client.response())[2] == b"new"


async def test_updates_under_load_fail_no_request() -> None:
    """Listeners, routes and clusters change all the time while requests run; every one gets its answer."""
    with Peer() as peer:
        variants = [
            everything_to(peer.address),
            configured(
                [listener(), listener(81)],
                [hosts(f"http.{PORT}", {"*": [route(forward("other"))]}), said("x", "http.81")],
                {"other": [peer.address]},
            ),
        ]
        async with gateway(variants[0], ports={PORT: 0, 81: 0}) as made:
            target, stop, statuses = url(made), asyncio.Event(), []

            async def load() -> None:
                async with httpx.AsyncClient(timeout=20) as client:
                    while not stop.is_set():
                        statuses.append((await client.get(target)).status_code)

            loads = [asyncio.create_task(load()) for _ in range(4)]
            for number in range(30):
                await reconfigure(made, variants[number % 2])
                await asyncio.sleep(0.02)
            stop.set()
            await asyncio.gather(*loads)
    assert len(statuses) > 20 and set(statuses) == {200}


async def test_stop_lets_requests_in_flight_finish_within_the_time() -> None:
    """Drained: no one new gets in, who is inside gets an answer; after the time, the rest is cut off."""
    for drain, released in ((5.0, True), (0.1, False)):
        slow = Slow()
        with Peer(slow) as peer:
            limits = Limits(drain=drain)
            async with gateway(everything_to(peer.address), limits=limits) as made, raw(made) as client:
                await client.send("GET / HTTP/1.1", "Host: a")
                await slow.asked.wait()
                at = address(made)
                stopping = asyncio.create_task(made.stop())
                await asyncio.sleep(0)
                while made.addresses:  # noqa: ASYNC110 -- until the doors are closed
                    await asyncio.sleep(0.01)
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection(*at)
                if released:
                    slow.release.set()
                    assert (await client.response())[2] == b"at last"
                else:
                    assert await client.rest() == b""
                await stopping
            slow.release.set()


async def test_a_port_in_use_is_reported_and_taken_when_free(monkeypatch, caplog) -> None:
    """The other listeners serve meanwhile, and it is said once, not once a second."""
    monkeypatch.setattr(doors, "RETRY", 0.05)
    monkeypatch.setattr("meshlib.gateway.server.RETRY", 0.05)
    two = configured([listener(1), listener(2)], [said("one", "http.1"), said("two", "http.2")], {})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with gateway(two, ports={1: port, 2: 0}) as made:
            assert set(made.addresses) == {"0.0.0.0_2"}
            (problem,) = made.problems
            assert f"0.0.0.0_1: 127.0.0.1:{port} can't be bound" in problem and "in use" in problem
            async with httpx.AsyncClient() as client:
                assert (await client.get(url(made, port=2))).text == "two"
                await asyncio.sleep(0.2)
                taken.close()
                async with asyncio.timeout(10):
                    while made.problems:  # noqa: ASYNC110 -- until the next attempt
                        await asyncio.sleep(0.01)
                assert (await client.get(url(made, port=1))).text == "one"
    assert sum("can't be bound" in record.message for record in caplog.records) == 1


async def test_an_address_that_can_be_none_keeps_no_other_door_shut() -> None:
    """Not only the system refuses addresses: Python does not even ask it about this one."""
    odd = replace(listener(1), address="ä" * 70)
    two = configured([odd, listener(2)], [said("one", "http.1"), said("two", "http.2")], {})
    async with gateway(two, ports={2: 0}) as made:
        assert set(made.addresses) == {"0.0.0.0_2"}
        (problem,) = made.problems
        assert "can't be bound" in problem


async def test_ports_map_as_service_ports_to_target_ports() -> None:
    """A Gateway's port 80 is served by the port it is mapped to; the listener keeps its name."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with gateway(configured([listener(80)], [said("eighty", "http.80")], {}), ports={80: port}) as made:
        assert made.addresses == {"0.0.0.0_80": ("127.0.0.1", port)}


async def test_small_answers_are_not_held_back() -> None:
    """Nagle's algorithm is off on every connection that comes in."""
    async with gateway(configured([listener()], [said("x")], {})) as made, raw(made) as client:
        await client.send("GET / HTTP/1.1", "Host: a")
        await client.response()
        (door,) = made._doors._open.values()
        (connection,) = door.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_run_serves_until_cancelled_or_stopped() -> None:
    with Peer() as peer:
        async with gateway(everything_to(peer.address)) as made:
            running = asyncio.create_task(made.run())
            async with httpx.AsyncClient() as client:
                assert (await client.get(url(made))).status_code == 200
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert made.addresses == {}
            running = asyncio.create_task(made.run())
            async with asyncio.timeout(10):
                while not made.addresses:  # noqa: ASYNC110 -- until it runs again
                    await asyncio.sleep(0.01)
                await made.stop()
                await running


# TLS


async def test_sni_chooses_certificate_and_routes(tmp_path, authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """Each server of a port has its certificate and its hosts; exact names win over wildcards; others are refused."""
    a, wild = Pair(tmp_path, authority, "a.shop.example"), Pair(tmp_path, authority, "*.shop.example")
    chains = [
        secured("https.a", a.certificate, a.key, "a.shop.example"),
        secured("https.wild", wild.certificate, wild.key, "*.shop.example"),
    ]
    snapshot = configured(
        [listener(443, *chains)],
        [said("a", "https.a", "a.shop.example"), said("wild", "https.wild", "*.shop.example")],
        {},
    )
    async with gateway(snapshot) as made:
        for name, certificate, text in (
            ("a.shop.example", "a.shop.example", b"a"),
            ("b.shop.example", "*.shop.example", b"wild"),
        ):
            async with raw(made, 443, trusting, name) as client:
                shown = client.writer.get_extra_info("peercert")["subjectAltName"]
                assert shown == (("DNS", certificate),)
                await client.send("GET / HTTP/1.1", f"Host: {name}")
                assert (await client.response())[2] == text
                await client.send("GET / HTTP/1.1", "Host: elsewhere.example.org")
                assert (await client.response())[0] == 404
        with pytest.raises(REFUSED):
            async with raw(made, 443, trusting, "other.org"):
                pass
        async with httpx.AsyncClient() as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get(url(made, port=443))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_versions(tmp_path, authority: trustme.CA, version: ssl.TLSVersion) -> None:
    """TLS 1.2 and 1.3 find their certificate by SNI alike; a client without SNI gets that of a server for all hosts."""
    pair, other = Pair(tmp_path, authority, "a.example"), Pair(tmp_path, authority, "127.0.0.1")
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    client_context.minimum_version = client_context.maximum_version = version
    chains = [
        secured("https.a", pair.certificate, pair.key, "a.example"),
        secured("https.all", other.certificate, other.key),
    ]
    routes = [said("a", "https.a"), said("all", "https.all")]
    async with gateway(configured([listener(443, *chains)], routes, {})) as made:
        for name, text in (("a.example", b"a"), ("127.0.0.1", b"all")):
            async with raw(made, 443, client_context, name) as client:
                await client.send("GET / HTTP/1.1", "Host: a")
                assert (await client.response())[2] == text


async def test_tls_requests_say_so_upstream(tmp_path, authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """X-Forwarded-Proto is https, the upstream is spoken to in plain, bodies stream as ever."""
    pair = Pair(tmp_path, authority, "a.example")
    with Peer(lambda r: Answer(body=r.body)) as peer:
        snapshot = configured(
            [listener(443, secured("https.a", pair.certificate, pair.key))],
            [hosts("https.a", {"*": [route(forward("app"))]}, require_tls=True)],
            {"app": [peer.address]},
        )
        async with gateway(snapshot) as made, raw(made, 443, trusting, "a.example") as client:
            body = b"x" * 3_000_000
            await client.send("POST / HTTP/1.1", "Host: a.example", f"Content-Length: {len(body)}", body=body)
            assert (await client.response())[2] == body
            assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
    assert peer.received[0].header("x-forwarded-proto") == "https"


async def test_certificates_are_read_anew(tmp_path, authority, trusting, monkeypatch, caplog) -> None:
    """A renewed pair is served at once; a bad one is logged and the one before stays; open connections live on."""
    monkeypatch.setattr(tls, "RECHECK", 0.0)
    monkeypatch.setattr(tls.Credentials.__init__, "__defaults__", (tls.Credentials.__init__.__defaults__[0], 0.0))
    caplog.set_level(logging.WARNING, "meshlib.gateway")
    pair = Pair(tmp_path, authority, "a.example")
    snapshot = configured([listener(443, secured("https.a", pair.certificate, pair.key))], [said("a", "https.a")], {})

    async def serial() -> str:
        async with raw(made, 443, trusting, "a.example") as client:
            return client.writer.get_extra_info("peercert")["serialNumber"]

    async with gateway(snapshot) as made, raw(made, 443, trusting, "a.example") as kept:
        first = await serial()
        pair.renew(authority, "a.example")
        second = await serial()
        assert first != second
        pair.spoil()
        assert await serial() == second
        assert await serial() == second
        assert sum("the one before stays in force" in record.message for record in caplog.records) == 1
        pair.remove()
        assert await serial() == second
        pair.renew(authority, "a.example")
        assert await serial() not in (first, second)
        await kept.send("GET / HTTP/1.1", "Host: a.example")
        assert (await kept.response())[2] == b"a"


async def test_a_certificate_that_comes_late_is_served_then(tmp_path, authority, trusting, monkeypatch, caplog) -> None:
    """Missing files are a reported problem, handshakes are refused, other servers of the port work."""
    monkeypatch.setattr(tls.Credentials.__init__, "__defaults__", (tls.Credentials.__init__.__defaults__[0], 0.0))
    good = Pair(tmp_path, authority, "a.example")
    late = (str(tmp_path / "b.example.pem"), str(tmp_path / "b.example.key"))
    chains = [secured("https.a", good.certificate, good.key, "a.example"), secured("https.b", *late, "b.example")]
    snapshot = configured([listener(443, *chains)], [said("a", "https.a"), said("b", "https.b")], {})
    async with gateway(snapshot) as made:
        assert made.problems == (f"https.b: certificate {late[0]} can't be used",)
        with pytest.raises(REFUSED):
            async with raw(made, 443, trusting, "b.example"):
                pass
        async with raw(made, 443, trusting, "a.example"):
            pass
        Pair(tmp_path, authority, "b.example")
        async with raw(made, 443, trusting, "b.example") as client:
            await client.send("GET / HTTP/1.1", "Host: b")
            assert (await client.response())[2] == b"b"
        assert made.problems == ()
    assert sum("handshakes are refused" in record.message for record in caplog.records) == 1


async def test_a_port_may_turn_from_plain_to_tls(tmp_path, authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """The same port goes on; plain connections end with the request they have."""
    pair = Pair(tmp_path, authority, "a.example")
    chain = secured("https.a", pair.certificate, pair.key)
    async with gateway(configured([listener()], [said("plain")], {})) as made, raw(made) as before:
        at = address(made)
        await reconfigure(made, configured([listener(PORT, chain)], [said("secure", "https.a")], {}, version="2"))
        assert address(made) == at
        assert await before.rest() == b""
        async with raw(made, PORT, trusting, "a.example") as client:
            await client.send("GET / HTTP/1.1", "Host: a")
            assert (await client.response())[2] == b"secure"
        await reconfigure(made, configured([listener()], [said("plain")], {}, version="3"))
        async with httpx.AsyncClient() as plain:
            assert (await plain.get(url(made))).text == "plain"


async def test_a_filter_chain_that_goes_drains_its_connections_alone(tmp_path, authority, trusting) -> None:
    a, b = Pair(tmp_path, authority, "a.example"), Pair(tmp_path, authority, "b.example")
    chain_a = secured("https.a", a.certificate, a.key, "a.example")
    chain_b = secured("https.b", b.certificate, b.key, "b.example")
    routes = [said("a", "https.a"), said("b", "https.b")]
    async with (
        gateway(configured([listener(443, chain_a, chain_b)], routes, {})) as made,
        raw(made, 443, trusting, "a.example") as stays,
        raw(made, 443, trusting, "b.example") as goes,
    ):
        await reconfigure(made, configured([listener(443, chain_a)], routes, {}, version="2"))
        assert await goes.rest() == b""
        await stays.send("GET / HTTP/1.1", "Host: a")
        assert (await stays.response())[2] == b"a"


def with_certificate(authority: trustme.CA, by: trustme.CA | None = None) -> ssl.SSLContext:
    """A client that shows one."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    (by or authority).issue_cert("client@example.org").configure_cert(context)
    return context


async def answered(made, context: ssl.SSLContext, name: str) -> bytes | None:
    """The body that a client gets there; None when it gets no connection."""
    try:
        async with raw(made, 443, context, name) as client:
            await client.send("GET / HTTP/1.1", f"Host: {name}")
            return (await client.response())[2]
    except (*REFUSED, asyncio.IncompleteReadError):
        return None


async def test_servers_of_every_mode_stand_on_one_port(tmp_path, authority: trustme.CA, trusting) -> None:
    """MUTUAL lets only those in whom its CA signed, OPTIONAL_MUTUAL also who shows nothing, SIMPLE asks nobody."""
    root, other = str(tmp_path / "ca.pem"), trustme.CA()
    authority.cert_pem.write_to_path(root)
    pairs = {name: Pair(tmp_path, authority, f"{name}.example") for name in ("mutual", "optional", "simple")}
    checks = {"mutual": {"ca_file": root, "mutual": True}, "optional": {"ca_file": root, "optional": True}}
    chains = [
        secured(f"https.{name}", pair.certificate, pair.key, f"{name}.example", **checks.get(name, {}))
        for name, pair in pairs.items()
    ]
    snapshot = configured([listener(443, *chains)], [said(name, f"https.{name}") for name in pairs], {})
    known, foreign = with_certificate(authority), with_certificate(authority, by=other)
    async with gateway(snapshot) as made:
        found = {
            name: [await answered(made, context, f"{name}.example") for context in (known, trusting, foreign)]
            for name in pairs
        }
        assert made.problems == ()
    assert found == {
        "mutual": [b"mutual", None, None],
        "optional": [b"optional", b"optional", None],
        "simple": [b"simple"] * 3,
    }


SECRET = """
apiVersion: v1
kind: Secret
metadata: {{name: {name}, namespace: {namespace}}}
type: kubernetes.io/tls
data:
  tls.crt: {chain}
  tls.key: {key}
"""


def secret_of(authority: trustme.CA, name: str, namespace: str = "istio-system") -> str:
    issued = authority.issue_cert(f"{name}.example")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    coded = [base64.b64encode(each).decode() for each in (chain, issued.private_key_pem.bytes())]
    return SECRET.format(name=name, namespace=namespace, chain=coded[0], key=coded[1])


async def test_secrets_are_found_by_their_names_and_read_anew(
    tmp_path, authority: trustme.CA, trusting, monkeypatch
) -> None:
    """Mounted as a folder, or written as YAML, with a CA beside it; one of another namespace is not the gateway's."""
    monkeypatch.setattr(tls.Credentials.__init__, "__defaults__", (tls.Credentials.__init__.__defaults__[0], 0.0))
    monkeypatch.setattr(secrets, "TOGETHER", 0.0)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    issued = authority.issue_cert("mounted.example")
    issued.private_key_pem.write_to_path(mounted / "tls.key")
    (mounted / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    ca = base64.b64encode(authority.cert_pem.bytes()).decode()
    beside = f"\napiVersion: v1\nkind: Secret\nmetadata: {{name: written-cacert}}\ndata: {{ca.crt: {ca}}}\n"
    foreign = secret_of(authority, "foreign", "elsewhere")
    (tmp_path / "secrets.yaml").write_text("---".join((secret_of(authority, "written"), beside, foreign)))
    names = ("mounted", "written", "foreign", "../written")
    chains = [
        secured(f"https.{name}", "", "", f"{name}.example", credential=name, mutual=name == "written") for name in names
    ]
    snapshot = configured([listener(443, *chains)], [said(name, f"https.{name}") for name in names], {})
    known = with_certificate(authority)
    async with gateway(snapshot, credentials=tmp_path) as made:
        assert await answered(made, trusting, "mounted.example") == b"mounted"
        assert await answered(made, known, "written.example") == b"written"
        assert await answered(made, trusting, "written.example") is None
        assert await answered(made, trusting, "foreign.example") is None
        assert made.problems == tuple(
            f"https.{name}: certificate secret {name} can't be used" for name in ("foreign", "../written")
        )

        async def serial() -> str:
            async with raw(made, 443, known, "written.example") as client:
                return client.writer.get_extra_info("peercert")["serialNumber"]

        async with raw(made, 443, known, "written.example") as kept:
            first = await serial()
            (tmp_path / "secrets.yaml").write_text("---".join((secret_of(authority, "written"), beside)))
            assert await serial() != first
            await kept.send("GET / HTTP/1.1", "Host: written.example")
            assert (await kept.response())[2] == b"written"


async def test_a_hello_may_come_byte_by_byte_and_never_holds_a_door_open(
    tmp_path, authority: trustme.CA, trusting
) -> None:
    """What is none is sent away; half a hello ends with the handshake's time; neither keeps others out."""
    pair = Pair(tmp_path, authority, "a.example")
    snapshot = configured([listener(443, secured("https.a", pair.certificate, pair.key))], [said("a", "https.a")], {})
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        trusting.wrap_bio(incoming, outgoing, server_hostname="a.example").do_handshake()
    hello = outgoing.read()
    assert hello_name(hello) == "a.example"
    assert {hello_name(hello[:end]) for end in range(len(hello))} == {None}
    with pytest.raises(NoHello):
        hello_name(b"GET / HTTP/1.1\r\n")
    async with gateway(snapshot, limits=Limits(handshake=1.0)) as made:
        reader, writer = await asyncio.open_connection(*address(made, 443))
        for byte in hello:
            writer.write(bytes((byte,)))
            await writer.drain()
        async with asyncio.timeout(20):
            assert await reader.read(1) == b"\x16"  # its ServerHello
        half, slow = await asyncio.open_connection(*address(made, 443))
        slow.write(hello[:50])
        assert await answered(made, trusting, "a.example") == b"a"
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await half.read() == b""
        for each in (writer, slow):
            each.close()


@given(st.binary(max_size=400))
def test_no_bytes_are_a_hello_by_accident(data: bytes) -> None:
    """Whatever comes: a name, not yet, or refused; no other error."""
    with contextlib.suppress(NoHello):
        hello_name(b"\x16\x03\x01" + len(data).to_bytes(2, "big") + data)
    with contextlib.suppress(NoHello):
        body = b"\x01" + len(data).to_bytes(3, "big") + data
        hello_name(b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body)


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_who_comes_in_at_the_moment_of_closing_is_sent_away(
    tmp_path: Path, authority: trustme.CA, turns: int, is_tls: bool
) -> None:
    """Between `accept` and the first word to it a connection is in nobody's list: it is closed, not forgotten."""
    pair = Pair(tmp_path, authority, "a.example")
    https = configured([listener(443, secured("https.a", pair.certificate, pair.key))], [said("a", "https.a")], {})
    async with gateway(https if is_tls else everything_to(("127.0.0.1", 9))) as made:
        [door] = made._doors._open.values()
        with socket.create_connection(door.address) as client:  # the kernel has taken it, and nobody else has run
            client.setblocking(False)
            door._accept()
            for _ in range(turns):
                await asyncio.sleep(0)
            door.close()
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 10) == b""
            await asyncio.wait_for(door.leave(0.1), 10)
        assert (door._arriving, door._entering, door.connections) == (set(), set(), set())
