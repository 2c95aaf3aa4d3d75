"""Ports, ages, tables, the file that says where the control plane is, and the display without a terminal."""

from __future__ import annotations

import asyncio
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from meshlib.cli import bookinfo, running
from meshlib.cli.demo_display import Display
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import prometheus
from meshlib.cli.ports import NoFreePort, free_port, is_free
from meshlib.cli.serving import Address, address
from meshlib.cli.tables import age, table
from meshlib.cli.traffic import Traffic
from peers import Answer, Peer, Received


def test_a_taken_port_leads_to_the_next_free_one() -> None:
    """Also when who has it listens on all addresses, where the kernel would let us listen beside it."""
    for host in ("127.0.0.1", ""):
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
            assert not is_free(port)
            assert port < free_port(port) <= port + 200


def test_ports_that_were_given_out_are_not_given_again() -> None:
    """Nobody listens there yet, so the kernel can't know."""
    first = free_port(0)
    assert free_port(first) == first
    assert free_port(first, {first}) != first


def test_no_port_is_an_error_and_not_an_endless_search() -> None:
    """The range is named."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(NoFreePort, match=f"between {port} and {port}"):
            free_port(port, tries=1)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (125, "2m5s"), (660, "11m"), (3 * 3600 + 60, "3h1m"), (9 * 3600, "9h"),
     (49 * 3600, "2d1h"), (9 * 86400, "9d"), (800 * 86400, "2y"), (-5, "0s")],
)  # fmt: skip
def test_ages_are_shown_as_kubectl_shows_them(seconds: float, shown: str) -> None:
    """Two units while they are small (apimachinery, duration.HumanDuration)."""
    assert age(seconds) == shown


def test_columns_are_as_wide_as_they_must_be() -> None:
    """Three spaces between, none at the end."""
    assert table(["NAME", "AGE"], [["reviews", "5s"], ["a", ""]]) == "NAME      AGE\nreviews   5s\na"


@pytest.mark.parametrize(
    ("text", "found"),
    [("127.0.0.1:15010", Address("127.0.0.1", 15010)), ("[::1]:0", Address("::1", 0)), ("host:1", Address("host", 1))],
)
def test_an_address_is_host_and_port(text: str, found: Address) -> None:
    """IPv6 in brackets; it prints as it was written."""
    assert address("--xds", text) == found
    assert str(found) == text


@pytest.mark.parametrize("text", ["", "15010", ":15010", "::1:15010", "host:", "host:99999", "host:-1"])
def test_what_is_no_address_is_refused_with_the_options_name(text: str) -> None:
    """A mistake is found before anything is started."""
    with pytest.raises(CommandFailed, match="--xds"):
        address("--xds", text)


def test_only_a_living_control_plane_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that was killed could not remove its file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert running.find() is None
    mine = running.Running("http://127.0.0.1:1", "127.0.0.1:2", os.getpid())
    running.announce(mine)
    assert running.find() == mine
    assert running.state_file().stat().st_mode & 0o077 == 0
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running.announce(running.Running("http://127.0.0.1:1", "127.0.0.1:2", ended.pid))
    assert running.find() is None


def test_withdrawing_leaves_the_file_of_a_later_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last one started wins, and stays found when the first one ends."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    later = running.Running("http://127.0.0.1:1", "127.0.0.1:2", os.getpid())
    running.announce(later)
    running.withdraw(os.getpid() + 1)
    assert running.find() == later
    running.withdraw(os.getpid())
    assert running.find() is None


def test_a_broken_file_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then the usual address is tried."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    running.state_file().parent.mkdir()
    running.state_file().write_text("{")
    assert running.find() is None


def test_without_a_terminal_every_change_is_a_line() -> None:
    """No control characters in a log."""
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=False), ["control plane", "gateway"]) as display:
        display.say("Bookinfo")
        display.state("control plane", "starting", "pid 1")
        display.state("control plane", "up")
        display.settle()
        display.bottom(lambda: "never shown")
    assert out.getvalue() == "Bookinfo\ncontrol plane is starting: pid 1\ncontrol plane is up\n"


def test_on_a_terminal_the_table_is_redrawn_and_left_behind_when_all_is_up() -> None:
    """Then one line at the bottom stays fresh, and lines about later changes scroll above it."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with Display(console, ["control plane", "gateway"]) as display:
        display.state("control plane", "starting")
        display.state("control plane", "up")
        display.state("gateway", "up")
        display.settle()
        display.bottom(lambda: "traffic 5/s")
        display.state("gateway", "down", "was ended by SIGKILL")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "gateway is down: was ended by SIGKILL" in plain
    assert "traffic 5/s" in plain
    assert re.search(r"✓\s+control plane\s+up", plain)


def test_the_plan_names_every_port_it_had_to_move(tmp_path: Path) -> None:
    """And no port is used twice."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plan = bookinfo.plan(bookinfo.find_examples(), tmp_path, gateway_port=port)
    ports = [part.port for part in plan.parts] + [int(plan.xds.rpartition(":")[2])]
    assert len(set(ports)) == len(ports)
    assert any(note.startswith(f"port {port} is taken: the gateway uses {plan.gateway.port}") for note in plan.notes)
    assert f"8080={plan.gateway.port}" in plan.gateway.program.command


def test_bookinfo_is_nine_processes_with_two_replicas_of_one_service(tmp_path: Path) -> None:
    """Seven services, as Istio deploys them and one more to balance on; each says who it is."""
    plan = bookinfo.plan(bookinfo.find_examples(), tmp_path, gateway_port=0)
    workloads = [part.program.environment["MESHLIB_WORKLOAD"] for part in plan.services]
    assert sorted(workloads) == [
        "details-v1", "productpage-v1", "ratings-v1", "ratings-v1", "reviews-v1", "reviews-v2", "reviews-v3",
    ]  # fmt: skip
    addresses = {part.program.environment["MESHLIB_ADDRESS"] for part in plan.services}
    assert len(addresses) == 7


def test_a_prometheus_can_scrape_the_demo_and_be_asked(tmp_path: Path) -> None:
    """Each process on a port that is nobody else's; whom the control plane asks is as it was typed."""
    plan = bookinfo.plan(bookinfo.find_examples(), tmp_path, gateway_port=0, prometheus_url="http://127.0.0.1:9090")
    members = (plan.gateway, *plan.services)
    ports = [int(part.program.environment["MESHLIB_PROMETHEUS"].rpartition(":")[2]) for part in members]
    others = [part.port for part in plan.parts] + [int(plan.xds.rpartition(":")[2])]
    assert len({*ports, *others}) == len(ports) + len(others)
    assert plan.control_plane.program.command[-2:] == ("--prometheus-url", "http://127.0.0.1:9090")
    with pytest.raises(CommandFailed, match="is written http://HOST:PORT"):
        prometheus("127.0.0.1:9090")


def test_without_the_examples_the_demo_says_where_to_get_them(tmp_path: Path) -> None:
    """As after `pip install`, outside a clone."""
    with pytest.raises(CommandFailed, match="needs a clone of the repository"):
        bookinfo.find_examples(tmp_path)


async def test_traffic_keeps_its_rate_while_answers_are_slow() -> None:
    """Open loop: else a page that hangs would look as if nobody asked."""

    async def slowly(received: Received) -> Answer:
        await asyncio.sleep(0.5)
        return Answer()

    with Peer(slowly) as peer:
        traffic = Traffic(f"http://127.0.0.1:{peer.port}/", 40)
        assert "no answer yet" in traffic.line()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.2):
                await traffic.run()
    assert 6 < traffic.sent <= 50  # who waits for each answer sends three
    assert "100.0 % ok" in traffic.line()
