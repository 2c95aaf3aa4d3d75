"""What does one command show of the mesh? Bookinfo on this machine: control plane, gateway and seven services.

Everything runs in processes of its own, as it would anywhere, so any of them can be killed to see what happens: it is
started again. Nothing outlives the demo (see supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import msgspec
import typer
from rich.console import Console

from meshlib.cli import bookinfo
from meshlib.cli.bookinfo import Part, Plan
from meshlib.cli.demo_display import Display
from meshlib.cli.demo_tokens import TokenFiles
from meshlib.cli.failure import CommandFailed
from meshlib.cli.options import prometheus
from meshlib.cli.ports import NoFreePort
from meshlib.cli.supervisor import Change, Event, Supervisor
from meshlib.cli.traffic import Traffic
from meshlib.controlplane import admin_api as api

START_TIMEOUT = 120.0
"""Seconds. Nine Python processes on a slow machine; on a usual one it takes about five."""
FIRST_PROBE, LONGEST_PROBE = 0.05, 0.5
TOO_OFTEN = 3
"""So many early ends in a row, and the demo gives up starting: the reason is in the log, not in one more try."""
LOG_TAIL = 15
TRAFFIC_LINES = 10.0
"""Seconds between two lines about the traffic where there is no terminal to keep one line fresh."""


def demo(
    traffic: Annotated[float, typer.Option(help="Requests each second to the page, 0 for none.", min=0, max=200)] = 0,
    port: Annotated[int, typer.Option(help="Where the gateway listens; 0 for any.")] = bookinfo.GATEWAY_PORT,
    state: Annotated[
        Path | None, typer.Option(help="Keep what is applied in this folder. Without it, it goes with the demo.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--bookinfo", help="The folder examples/bookinfo of a clone.", metavar="DIR")
    ] = None,
    grpc: Annotated[bool, typer.Option("--grpc", help="reviews v3 asks ratings over gRPC.")] = False,
    prometheus_url: Annotated[
        str,
        typer.Option(metavar="URL", help="Ask this Prometheus, which scrapes the demo, for the figures of the graph."),
    ] = "",
    exit_when_ready: Annotated[bool, typer.Option(help="Stop once everything works: for tests.")] = False,
) -> None:
    """Run Istio's Bookinfo on the mesh, on this machine, until Ctrl-C."""
    examples, url = bookinfo.find_examples(folder), prometheus(prometheus_url)
    bookinfo.check_requirements()
    run_folder = Path(tempfile.mkdtemp(prefix="meshlib-demo-"))
    try:
        kept = state.resolve() if state else None
        plan = bookinfo.plan(examples, run_folder, gateway_port=port, state=kept, grpc=grpc, prometheus_url=url)
    except NoFreePort as error:
        raise CommandFailed(str(error)) from None
    console = Console(highlight=False)
    with Display(console, [part.program.name for part in plan.parts]) as display:
        display.say(f"Bookinfo from {plan.examples}, logs in {plan.run_folder / 'logs'}")
        for note in plan.notes:
            display.say(note, "yellow")
        asyncio.run(Demo(plan, display, traffic).run(exit_when_ready=exit_when_ready))


class Demo:
    """One run. Follows every part all the time: ready, ended, ready again."""

    def __init__(self, plan: Plan, display: Display, rate: float) -> None:
        self._plan, self._display, self._rate = plan, display, rate
        self._parts = {part.program.name: part for part in plan.parts}
        self._started = {name: asyncio.Event() for name in self._parts}
        self._ended = {name: asyncio.Event() for name in self._parts}
        self._up = {name: asyncio.Event() for name in self._parts}
        self._gave_up: asyncio.Future[CommandFailed]
        self._is_ready = False

    async def run(self, *, exit_when_ready: bool = False) -> None:
        """Until a signal, or until ready. CommandFailed when the demo does not come up."""
        loop = asyncio.get_running_loop()
        self._gave_up = loop.create_future()
        client = httpx.AsyncClient(timeout=10.0, trust_env=False)
        tokens = TokenFiles(self._plan.admin, self._plan.parts, client)
        async with client, Supervisor(self._tell, prepare=tokens.prepare) as supervisor:
            work = loop.create_task(self._work(supervisor, client, tokens, exit_when_ready))
            signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            for number in signals:
                loop.add_signal_handler(number, work.cancel)
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                self._display.bottom(lambda: "")
                self._display.say("stopping")
            finally:
                # The handlers stay until all is stopped: a second Ctrl-C must not leave half of it running.
                await supervisor.stop()
                for number in signals:
                    loop.remove_signal_handler(number)
        self._display.say(f"stopped; the logs stay in {self._plan.run_folder / 'logs'}")

    async def _work(
        self, supervisor: Supervisor, client: httpx.AsyncClient, tokens: TokenFiles, exit_when_ready: bool
    ) -> None:
        async with background() as start:
            start(tokens.keep())
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    await self._unless_given_up(self._bring_up(supervisor, client, start))
            except TimeoutError:
                raise self._too_slow() from None
            self._is_ready = True
            self._display.settle()
            self._explain()
            if exit_when_ready:
                return
            if self._rate:
                start(self._make_traffic())
            await asyncio.get_running_loop().create_future()  # until a signal cancels it

    async def _bring_up(
        self, supervisor: Supervisor, client: httpx.AsyncClient, start: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        """The control plane first, so that nobody waits for a reconnect; then all others at once."""
        plan = self._plan
        supervisor.start(plan.control_plane.program)
        start(self._follow(plan.control_plane, client))
        await self._up[bookinfo.CONTROL_PLANE].wait()
        for part in plan.services:
            supervisor.start(part.program)
            start(self._follow(part, client))
        supervisor.start(plan.gateway.program)
        for part in plan.services:
            await self._up[part.program.name].wait()
        await probing(lambda: self._are_registered(client))
        # Last: its page needs all of them.
        start(self._follow(plan.gateway, client))
        await self._up[bookinfo.GATEWAY].wait()

    async def _unless_given_up(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._gave_up}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._gave_up.done():
                raise self._gave_up.result()
            await task
        finally:
            task.cancel()

    async def _follow(self, part: Part, client: httpx.AsyncClient) -> None:
        """Keeps the display's state of one part, from one life of its process to the next."""
        name = part.program.name
        while True:
            await self._started[name].wait()
            self._started[name].clear()
            self._ended[name].clear()
            answers = asyncio.ensure_future(probing(lambda: is_up(client, part.ready_url)))
            ended = asyncio.ensure_future(self._ended[name].wait())
            try:
                await asyncio.wait({answers, ended}, return_when=asyncio.FIRST_COMPLETED)
                if answers.done() and not ended.done():
                    self._up[name].set()
                    self._display.state(name, "up")
                    await ended
            finally:
                answers.cancel()
                ended.cancel()
            self._up[name].clear()

    async def _are_registered(self, client: httpx.AsyncClient) -> bool:
        """Whether the control plane knows the endpoint of every service that runs."""
        try:
            response = await client.get(f"{self._plan.admin}/v1/endpoints")
            services = msgspec.json.decode(response.raise_for_status().content, type=api.Endpoints).services
        except (httpx.HTTPError, msgspec.DecodeError):
            return False
        registered = {endpoint.address for service in services for endpoint in service.endpoints}
        return all(f"{bookinfo.HOST}:{part.port}" in registered for part in self._plan.services)

    def _tell(self, event: Event) -> None:
        name = event.program.name
        match event.change:
            case Change.STARTED:
                self._started[name].set()
                self._display.state(name, "starting", f"pid {event.pid}")
            case Change.ENDED:
                self._ended[name].set()
                self._display.state(name, "down", f"{event.reason}; starting it again in {event.delay:g} s")
                if not self._is_ready and event.early >= TOO_OFTEN and not self._gave_up.done():
                    self._gave_up.set_result(
                        CommandFailed(f"{name} {event.reason}, {event.early} times in a row.{tail(event.program.log)}")
                    )
            case Change.STOPPED:
                self._ended[name].set()

    def _too_slow(self) -> CommandFailed:
        waiting = [name for name, up in self._up.items() if not up.is_set()]
        logs = "".join(tail(self._parts[name].program.log) for name in waiting[:2])
        return CommandFailed(f"after {START_TIMEOUT:.0f} s these are not ready: {', '.join(waiting)}.{logs}")

    async def _make_traffic(self) -> None:
        traffic = Traffic(self._plan.page, self._rate)
        self._display.bottom(lambda: f"traffic {traffic.line()}")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic.run())
            while not self._display.is_live:
                await asyncio.sleep(TRAFFIC_LINES)
                self._display.say(f"traffic {traffic.line()}")

    def _explain(self) -> None:
        plan, say = self._plan, self._display.say
        meshctl, networking = own_command(), shown_path(plan.examples / "networking")
        say()
        say(f"Bookinfo is up: {plan.page}", "bold green")
        say(f"the mesh at work: {plan.admin}/dashboard/", "bold green")
        say(f"for Prometheus (http_sd_configs): {plan.admin}/sd/prometheus")
        say(f"control plane: xDS {plan.xds}, admin {plan.admin}; logs: {plan.run_folder / 'logs'}")
        say()
        say("Reload the page a few times: reviews v1 (no stars), v2 (black) and v3 (red) take turns. Then, in another")
        say("terminal:")
        say()
        for command, what in (
            (f"apply -f {networking}/virtual-service-all-v1.yaml", "all traffic to v1: no stars"),
            (f"apply -f {networking}/virtual-service-reviews-test-v2.yaml", "black stars, once you sign in as jason"),
            (f"apply -f {networking}/virtual-service-ratings-test-abort.yaml", "ratings fail, for jason only"),
            (f"delete -f {networking}/virtual-service-ratings-test-abort.yaml", "and work again"),
            ("proxy-status", "who is connected, and in sync"),
            ("get vs", "what is in force, and where it comes from"),
        ):
            say(f"  # {what}", "dim")
            say(f"  {meshctl} {command}")
        say()
        if not plan_keeps_state(plan):
            say("What you apply goes with the demo; --state FOLDER keeps it.")
        say("Ctrl-C stops everything.")


class background:
    """Tasks that end with the block. One that fails is an error of ours and ends the block's task at once."""

    def __init__(self) -> None:
        self._tasks = asyncio.TaskGroup()
        self._started: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Callable[[Coroutine[Any, Any, None]], None]:
        await self._tasks.__aenter__()
        return lambda work: self._started.append(self._tasks.create_task(work))

    async def __aexit__(self, *error: Any) -> None:
        for task in self._started:
            task.cancel()
        # A TaskGroup would wrap the block's own error in a group; only its being cancelled is the group's business.
        is_cancelled = isinstance(error[1], asyncio.CancelledError)
        await self._tasks.__aexit__(*(error if is_cancelled else (None, None, None)))


async def probing(ask: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Returns once `ask` says yes. Another process' readiness can only be asked for; less and less often."""
    delay = FIRST_PROBE
    while not await ask():
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, LONGEST_PROBE)


async def is_up(client: httpx.AsyncClient, url: str) -> bool:
    """Whether it answers 200, or, with `tcp:`, takes a connection."""
    if url.startswith("tcp:"):
        parts = urlsplit(url)
        try:
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            return False
        writer.close()
        return True
    try:
        return (await client.get(url)).status_code == 200
    except httpx.HTTPError:
        return False


def tail(log: Path) -> str:
    """The last lines of a log, indented below their file's name."""
    try:
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
    except OSError:
        return f"\n{log} can't be read"
    return "".join([f"\n{log} ends with:", *(f"\n    {line}" for line in lines)])


def own_command() -> str:
    """How the person typed meshctl, so that what we print can be pasted."""
    typed = Path(sys.argv[0])
    if typed.name != "meshctl":
        return f"{shlex.quote(sys.executable)} -m meshlib.cli"
    found = shutil.which("meshctl")
    if found and Path(found).resolve() == typed.resolve():
        return "meshctl"
    return shlex.quote(shown_path(typed))


def shown_path(path: Path) -> str:
    """Relative where that is shorter."""
    full = path if path.is_absolute() else Path.cwd() / path
    relative = os.path.relpath(full)
    return relative if len(relative) < len(str(full)) else str(full)


def plan_keeps_state(plan: Plan) -> bool:
    command = plan.control_plane.program.command
    return not Path(command[command.index("--state") + 1]).is_relative_to(plan.run_folder)
