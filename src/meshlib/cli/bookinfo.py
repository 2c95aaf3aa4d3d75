"""Which processes, ports and files make up the demo? Bookinfo as Istio deploys it, on one machine.

Istio's six deployments (facts that its tutorials rely on: productpage, details and ratings v1; reviews v1, v2, v3), and
a second replica of ratings: without one there would be nothing to balance, eject or retry on.
"""

from __future__ import annotations

import importlib.util
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from meshlib.cli.failure import CommandFailed
from meshlib.cli.ports import free_port
from meshlib.cli.supervisor import Program

HOST = "127.0.0.1"
GATEWAY_PORT, XDS_PORT, ADMIN_PORT = 8080, 15010, 15014
METRICS_PORT = 15090
"""The first of those on which processes are scraped; Istio's, of its sidecars."""
CONFIGURATION = ("platform/bookinfo.yaml", "networking/bookinfo-gateway.yaml", "networking/destination-rule-all.yaml")
GRPC_CONFIGURATION = "platform/bookinfo-ratings-grpc.yaml"
"""What `--grpc` adds."""
SOURCE_FOLDER = Path(__file__).resolve().parents[3]
CONTROL_PLANE, GATEWAY = "control plane", "gateway"


class Account(NamedTuple):
    """A service account: whose identity a process has, `spiffe://cluster.local/ns/<namespace>/sa/<name>`."""

    namespace: str
    name: str


GATEWAY_ACCOUNT = Account("istio-system", "istio-ingressgateway-service-account")
"""Istio's name for it."""


class Service(NamedTuple):
    """One process of Bookinfo. name: the process's, unique. port: the usual one."""

    name: str
    service: str
    version: str
    port: int
    environment: Mapping[str, str] = {}
    speaks_grpc: bool = False

    @property
    def program(self) -> str:
        return f"{self.service.replace('-', '_')}.py"

    @property
    def workload(self) -> str:
        return f"{self.service}-{self.version}"

    @property
    def account(self) -> Account:
        """As platform/bookinfo.yaml names it."""
        return Account("default", f"bookinfo-{self.service}")


SERVICES = (
    Service("productpage-v1", "productpage", "v1", 9080),
    Service("details-v1", "details", "v1", 9081),
    Service("reviews-v1", "reviews", "v1", 9082),
    Service("reviews-v2", "reviews", "v2", 9083, {"ENABLE_RATINGS": "true"}),
    Service("reviews-v3", "reviews", "v3", 9084, {"ENABLE_RATINGS": "true", "STAR_COLOR": "red"}),
    Service("ratings-v1-a", "ratings", "v1", 9085),
    Service("ratings-v1-b", "ratings", "v1", 9086),
)


RATINGS_GRPC = Service("ratings-grpc-v1", "ratings-grpc", "v1", 9087, speaks_grpc=True)


def services_of(grpc: bool) -> tuple[Service, ...]:
    """grpc: reviews v3 asks ratings over gRPC, of a process of its own."""
    if not grpc:
        return SERVICES
    asking = [
        each._replace(environment={**each.environment, "RATINGS_PROTOCOL": "grpc"})
        if each.name == "reviews-v3"
        else each
        for each in SERVICES
    ]
    return (*asking, RATINGS_GRPC)


@dataclass(frozen=True, slots=True)
class Part:
    """A program of the demo. ready_url answers 200 once it can work; one of `tcp:` takes connections then.

    account: whose certificate it gets by the join token in token_file; None for the control plane, which has its own.
    """

    program: Program
    port: int
    ready_url: str
    account: Account | None = None
    token_file: Path = Path()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before the first process starts. notes: what differs from the usual, for people."""

    examples: Path
    run_folder: Path
    control_plane: Part
    gateway: Part
    services: tuple[Part, ...]
    xds: str
    admin: str
    notes: tuple[str, ...]

    @property
    def parts(self) -> Iterator[Part]:
        yield self.control_plane
        yield self.gateway
        yield from self.services

    @property
    def page(self) -> str:
        return f"http://{HOST}:{self.gateway.port}/productpage"


def find_examples(folder: Path | None = None) -> Path:
    """examples/bookinfo of the clone that meshlib runs from, or below the current folder. CommandFailed if neither."""
    places = [folder] if folder else [SOURCE_FOLDER / "examples" / "bookinfo", Path.cwd() / "examples" / "bookinfo"]
    for place in places:
        if all((place / file).is_file() for file in (*CONFIGURATION, "services/productpage.py")):
            return place.resolve()
    raise CommandFailed(
        f"Bookinfo is not in {places[-1]}: the demo needs a clone of the repository. "
        "Run it inside one, or name its folder: meshctl demo --bookinfo CLONE/examples/bookinfo"
    )


def check_requirements() -> None:
    """CommandFailed if what Bookinfo's services import is not installed."""
    missing = [name for name in ("flask", "gunicorn", "starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise CommandFailed(
            f"Bookinfo's services need {', '.join(missing)}: run `make demo` in the clone, "
            f"or {shlex.join([sys.executable, '-m', 'pip', 'install', *missing])}"
        )


def plan(
    examples: Path,
    run_folder: Path,
    *,
    gateway_port: int = GATEWAY_PORT,
    state: Path | None = None,
    grpc: bool = False,
    prometheus_url: str = "",
) -> Plan:
    """Choose ports and write down each process. Port 0 for the gateway takes any free one.

    Each process is scraped on a port of its own; prometheus_url: whom the control plane asks for what was."""
    taken: dict[str, int] = {}
    notes: list[str] = []

    def port(name: str, wanted: int) -> int:
        found = free_port(wanted, set(taken.values()))
        if wanted and found != wanted:
            notes.append(f"port {wanted} is taken: {name} uses {found}")
        taken[name] = found
        return found

    gateway = port("the gateway", gateway_port)
    xds, admin = port("the control plane (xDS)", XDS_PORT), port("the control plane (admin)", ADMIN_PORT)
    target, admin_url = f"{HOST}:{xds}", f"http://{HOST}:{admin}"
    logs, cache, tokens = run_folder / "logs", run_folder / "cache", run_folder / "tokens"
    meshctl = (sys.executable, "-m", "meshlib.cli")
    secret = secrets.token_hex(32)

    def metrics_port(name: str) -> int:
        found = taken[f"metrics of {name}"] = free_port(METRICS_PORT, set(taken.values()))
        return found  # told by /sd/prometheus, so nobody needs a note

    def member(name: str) -> dict[str, str]:
        """The settings of every process that is in the mesh."""
        return {
            "MESHLIB_CONTROL_PLANE": target,
            "MESHLIB_IDENTITY": "control-plane",
            "MESHLIB_TOKEN_FILE": str(tokens / name),
            "MESHLIB_CACHE_DIR": str(cache / name),
            "MESHLIB_TELEMETRY_INTERVAL": "1",
            "MESHLIB_TRACE_SAMPLING": "100",
            "MESHLIB_PROMETHEUS": f"{HOST}:{metrics_port(name)}",
            "PYTHONUNBUFFERED": "1",
        }

    files = (*CONFIGURATION, GRPC_CONFIGURATION) if grpc else CONFIGURATION
    configuration = [str(examples / file) for file in files]
    control_plane_command = (*meshctl, "control-plane", *configuration, "--state", str(state or run_folder / "state"))
    asked = ("--prometheus-url", prometheus_url) if prometheus_url else ()
    control_plane = Program(
        CONTROL_PLANE,
        (*control_plane_command, "--xds", target, "--tls", "--admin", f"{HOST}:{admin}", *asked),
        logs / "control-plane.log",
        {"PYTHONUNBUFFERED": "1"},
    )
    gateway_command = (*meshctl, "gateway", "--control-plane", target, "--labels", "istio=ingressgateway")
    gateway_program = Program(
        GATEWAY,
        (
            *gateway_command,
            *("--name", "istio-ingressgateway", "--namespace", "istio-system"),
            *("--bind", HOST, "--port", f"{GATEWAY_PORT}={gateway}"),
        ),
        logs / "gateway.log",
        {**member(GATEWAY), "MESHLIB_SERVICE_ACCOUNT": GATEWAY_ACCOUNT.name},
    )
    services = []
    for service in services_of(grpc):
        own = port(service.name, service.port)
        environment = {
            **member(service.name),
            "MESHLIB_SERVICE": service.service,
            "MESHLIB_NAMESPACE": service.account.namespace,
            "MESHLIB_LABELS": f"app={service.service},version={service.version}",
            "MESHLIB_SERVICE_ACCOUNT": service.account.name,
            "MESHLIB_WORKLOAD": service.workload,
            "MESHLIB_ADDRESS": f"{HOST}:{own}",
            "MESHLIB_FORWARD_HEADERS": "end-user",
            "MESHLIB_PROBE_PATHS": "/health",  # the demo asks for it in plaintext, as a kubelet would
            "SERVICE_VERSION": service.version,
            "SESSION_SECRET": secret,
            "HOSTNAME": service.name,
            "HOST": HOST,
            **service.environment,
        }
        command = (sys.executable, service.program, str(own))
        program = Program(service.name, command, logs / f"{service.name}.log", environment, examples / "services")
        health = f"tcp://{HOST}:{own}" if service.speaks_grpc else f"http://{HOST}:{own}/health"
        services.append(Part(program, own, health, service.account, tokens / service.name))
    return Plan(
        examples=examples,
        run_folder=run_folder,
        control_plane=Part(control_plane, admin, f"{admin_url}/readyz"),
        gateway=Part(
            gateway_program, gateway, f"http://{HOST}:{gateway}/productpage", GATEWAY_ACCOUNT, tokens / GATEWAY
        ),
        services=tuple(services),
        xds=target,
        admin=admin_url,
        notes=tuple(notes),
    )
