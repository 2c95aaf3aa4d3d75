"""What is the traffic like? meshctl dashboard, stat, edges and traces: the page's figures, and the way to the page."""

from __future__ import annotations

import json
import time
import webbrowser
from collections.abc import Iterable
from typing import Annotated

import msgspec
import typer

from meshlib.cli.admin_client import AdminClient
from meshlib.cli.failure import CommandFailed
from meshlib.cli.live import again, show
from meshlib.cli.options import ControlPlaneUrl
from meshlib.cli.tables import table
from meshlib.controlplane.graph import Graph, Node, Rates
from meshlib.controlplane.picture import Traces

Output = Annotated[str, typer.Option("--output", "-o", help="json.")]
Window = Annotated[float, typer.Option("--window", "-w", help="Seconds to look back.", min=5, max=86400)]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Only this namespace.")]
_HEADERS = ("SUCCESS", "RPS", "LATENCY_P50", "LATENCY_P95", "LATENCY_P99")


def dashboard(
    control_plane: ControlPlaneUrl = "",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open the page that shows the mesh; it is served by the control plane."""
    with AdminClient(control_plane) as client:
        client.version()  # nobody there is told here, not by an empty browser
        url = f"{client.url}/dashboard/"
    typer.echo(url)
    if browser:
        webbrowser.open(url)


def stat(
    namespace: Namespace = "",
    window: Window = 60,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every 2 s, until Ctrl-C.")] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="json, or wide with success before and after retries.")
    ] = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """What each workload and service served: success, rate, latencies.

    -o wide: what the callers of a service got in the end (effective), and what each of their tries did (actual).
    """
    if output not in ("", "json", "wide"):
        raise CommandFailed(f"-o {output}: there are json and wide")
    if watch and output == "json":
        raise CommandFailed("--watch is for a table, not with -o json")
    for _ in again(watch):
        graph = _graph(control_plane, window, services=True)
        nodes = [node for node in graph.nodes if namespace in ("", node.namespace) and node.kind != "unknown"]
        if output == "json":
            _as_json(output, nodes)
        elif nodes:
            show(_stat_table(nodes, wide=output == "wide"), watch)
        elif watch:
            show(_NOTHING, watch)
        else:
            raise CommandFailed(_NOTHING)


_NOTHING = "no process is connected, and no traffic was seen"


def _stat_table(nodes: Iterable[Node], *, wide: bool) -> str:
    more = ["EFFECTIVE_SUCCESS", "EFFECTIVE_RPS", "ACTUAL_SUCCESS", "ACTUAL_RPS"] if wide else []
    return table(
        ["NAMESPACE", "KIND", "NAME", "INSTANCES", *_HEADERS, *more],
        (
            [
                node.namespace or "-",
                node.kind,
                node.name,
                str(node.instances or "-"),
                *_figures(node.incoming),
                *(_tries(node) if wide else ()),
            ]
            for node in nodes
        ),
    )


def _tries(node: Node) -> Iterable[str]:
    told = node.tries
    if told is None:
        return ("-",) * 4
    return (
        f"{told.effective_success:.2%}",
        f"{told.effective_rps:.1f}rps",
        f"{told.actual_success:.2%}",
        f"{told.actual_rps:.1f}rps",
    )


def edges(
    namespace: Namespace = "", window: Window = 60, output: Output = "", control_plane: ControlPlaneUrl = ""
) -> None:
    """Who calls whom, how well, and whether by mutual TLS."""
    graph = _graph(control_plane, window, services=False)
    known = {node.id: node for node in graph.nodes}
    found = [
        edge
        for edge in graph.edges
        if not namespace or namespace in (known[edge.source].namespace, known[edge.target].namespace)
    ]
    if _as_json(output, found):
        return
    if not found:
        raise CommandFailed(
            f"no request was seen in the last {window:.0f} s: processes tell what they counted every "
            "MESHLIB_TELEMETRY_INTERVAL (10 s); --window looks further back"
        )
    typer.echo(
        table(
            [
                "SRC",
                "DST",
                "SRC_NS",
                "DST_NS",
                "SECURED",
                "SUCCESS",
                "RPS",
                "LATENCY_P50",
                "LATENCY_P95",
                "LATENCY_P99",
            ],
            (
                [
                    known[edge.source].name,
                    known[edge.target].name,
                    known[edge.source].namespace or "-",
                    known[edge.target].namespace or "-",
                    "√" if edge.mtls >= 0.9995 else f"{edge.mtls:.0%}",
                    *_figures(edge.rates),
                ]
                for edge in found
            ),
        )
    )


def traces(
    failed: Annotated[bool, typer.Option("--failed", help="Only requests in which something failed.")] = False,
    slower: Annotated[float, typer.Option(help="Only those that took more milliseconds than this.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="How many, the newest first.", min=1, max=2000)] = 20,
    output: Output = "",
    control_plane: ControlPlaneUrl = "",
) -> None:
    """The last traced requests."""
    query = {"limit": str(limit), "failed": "true" if failed else "", "slower": str(slower / 1000) if slower else ""}
    with AdminClient(control_plane) as client:
        found = client.get("/v1/traces", query, Traces).traces
    if _as_json(output, found):
        return
    if not found:
        raise CommandFailed("no such trace: are requests sampled (MESHLIB_TRACE_SAMPLING, Telemetry)?")
    typer.echo(
        table(
            ["TRACE", "TIME", "SERVICE", "NAME", "TOOK", "SPANS", "RESULT"],
            (
                [
                    each.trace_id,
                    time.strftime("%H:%M:%S", time.localtime(each.began)),
                    each.service,
                    each.name,
                    _milliseconds(each.duration * 1000),
                    str(each.spans),
                    "failed" if each.failed else "ok",
                ]
                for each in found
            ),
        )
    )


def _graph(control_plane: str, window: float, *, services: bool) -> Graph:
    with AdminClient(control_plane) as client:
        return client.get("/v1/graph", {"seconds": str(window), "services": str(services).lower()}, Graph)


def _as_json(output: str, found: object) -> bool:
    if output not in ("", "json"):
        raise CommandFailed(f"-o {output}: there is json")
    if output:
        typer.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    return bool(output)


def _figures(rates: Rates) -> Iterable[str]:
    if not rates.rps:
        return ("-",) * 5
    return (
        f"{1 - rates.errors:.2%}",
        f"{rates.rps:.1f}rps",
        _milliseconds(rates.p50),
        _milliseconds(rates.p95),
        _milliseconds(rates.p99),
    )


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}ms"
