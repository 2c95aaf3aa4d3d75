"""What does a run tell? Its rows as a page: the text of performance.template with tables, plots and sentences made of
them.

A figure that the run does not have is told to be missing; none is written by hand.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import calls, gateway, grpc_calls, inbound, instead, mtls, policy, policy_items, startup, updates
from benchmarks.figures import Found, best, difference_of, median, ratio_of, row_of, rows_of
from benchmarks.plots import Group, bars
from benchmarks.sections import SECTIONS
from benchmarks.targets import targets

TEMPLATE = Path(__file__).with_name("performance.template")
NOTICEABLE = 1.05
"""From which ratio on something counts as slower: less is within what two runs differ by."""
Row = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    body = list(rows)
    if not body:
        return "*Not in this run.*"
    marks = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *body))


def by(value: float | None) -> str:
    """A ratio."""
    return "" if value is None else f"{value:.2f} x"


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


# Tables


def _header(found: Found) -> str:
    if not found:
        return "**There are no figures on this page yet**: a run on a machine that does nothing else brings them."
    machines = [section["machine"] for section in found.values()]
    first, efforts = machines[0], {section["effort"] for section in found.values()}
    dates = sorted({machine["date"] for machine in machines})
    load = max(machines[0]["load"], 0.0)
    told = [
        f"Measured on {dates[0]}"
        + (f" to {dates[-1]}" if dates[-1] != dates[0] else "")
        + f", revision {first['commit']}, "
        f"on {first['cores']} cores of {first['processor']}, {first['memory']}, {first['system']}, {first['python']}; "
        f"{', '.join(first['libraries'])}; {', '.join(first['tools']) or 'no proxies'}.",
        f"The load average was {load:.1f} before the first section began"
        + (
            ": **the machine was busy with other things, so these figures are rough.**"
            if load > 0.25 * first["cores"]
            else "."
        ),
    ]
    if efforts != {"full"}:
        kind = " and ".join(sorted(efforts))
        told.append(
            f"**This was a {kind} run, to see that everything runs: its rounds are too few and short to judge by.**"
        )
    return "\n".join(told)


def _sections(found: Found) -> str:
    rows = []
    for name, section in SECTIONS.items():
        run = found.get(name)
        told = "not run"
        if run is not None:
            gone = "; ".join(f"without {what}: {why}" for what, why in run.get("skipped", {}).items())
            told = f"**failed: {run['failure']}**" if run["failure"] else gone or "complete"
        rows.append((f"`{name}`", section.title, f"{run['seconds']:.0f} s" if run else "", told))
    lines = ["| Section | | Time | |", "| --- | --- | ---: | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _targets(found: Found) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    all_targets = targets(found)
    rows = [(target.what, target.wanted, target.measured, words[target.is_met]) for target in all_targets]
    return "\n".join(
        ["| | Target | Measured | Met |", "| --- | --- | --- | --- |", *("| " + " | ".join(r) + " |" for r in rows)]
    )


HEAD = (
    "",
    "At once",
    "Requests/s",
    "by bare",
    "p50 ms",
    "by bare",
    "p99 ms",
    "by bare",
    "CPU s/1,000",
    "by bare",
    "with server",
)


def _call_row(row: Row, bare: Row | None) -> tuple[str, ...]:
    mine = None if bare is row else bare
    rate = None if mine is None else ratio_of(mine, row, "microseconds")
    return (
        row["contestant"],
        str(row["concurrency"]),
        f"{1e6 / statistics.median(row['microseconds']):.0f}",
        by(rate),
        number(median(row, "p50_ms")),
        by(ratio_of(row, mine, "p50_ms")),
        number(median(row, "p99_ms")),
        by(ratio_of(row, mine, "p99_ms")),
        number(median(row, "cpu")),
        by(ratio_of(row, mine, "cpu")),
        number(median(row, "all_cpu")),
    )


def bare_row(rows: Sequence[Row], row: Row) -> Row | None:
    """What it is compared with: the faster of the bare ones of the same client, with TLS if it has TLS."""
    tls = calls.TLS if row["contestant"].endswith(calls.TLS) else ""
    names = {calls.BARE + tls, calls.DEFAULT_POOL + tls}
    same = (row["client"], row["concurrency"])
    return best(
        [each for each in rows if (each["client"], each["concurrency"]) == same and each["contestant"] in names]
    )


def _client_tables(found: Found, section: str, clients: Sequence[str]) -> str:
    rows = rows_of(found, section)
    parts = []
    for client in clients:
        mine = [row for row in rows if row["client"] == client]
        parts.append(f"### {client}\n\n" + table(HEAD, (_call_row(row, bare_row(rows, row)) for row in mine)))
    return "\n\n".join(parts)


def _instead(found: Found) -> str:
    rows = []
    for row in rows_of(found, "instead"):
        alone = row_of(found, "instead", concurrency=row["concurrency"], contestant=instead.ALONE)
        other = None if row["contestant"] == instead.ALONE else alone
        added = difference_of(row, other, "p50_ms")
        rows.append(
            (
                row["contestant"],
                str(row["concurrency"]),
                f"{1e6 / statistics.median(row['microseconds']):.0f}",
                number(median(row, "p50_ms")),
                number(None if added is None else added * 1e3, "+.0f"),
                number(median(row, "p99_ms")),
                number(median(row, "cpu")),
                number(median(row, "all_cpu")),
            )
        )
    head = ("", "At once", "Requests/s", "p50 ms", "added µs", "p99 ms", "CPU s/1,000, client", "of all processes")
    return table(head, rows)


def _compared(found: Found, section: str, base: str) -> str:
    """Tables of servers: each by `base`."""
    rows = []
    for row in rows_of(found, section):
        first = row_of(found, section, concurrency=row["concurrency"], contestant=base)
        mine = None if row["contestant"] == base else first
        server = [whole - client for whole, client in zip(row["all_cpu"], row["cpu"], strict=True)]
        rows.append(
            (
                row["contestant"],
                str(row["concurrency"]),
                f"{1e6 / statistics.median(row['microseconds']):.0f}",
                by(None if mine is None else ratio_of(mine, row, "microseconds")),
                number(median(row, "p50_ms")),
                by(ratio_of(row, mine, "p50_ms")),
                number(median(row, "p99_ms")),
                number(statistics.median(server)),
            )
        )
    head = ("", "At once", "Requests/s", f"by {base}", "p50 ms", f"by {base}", "p99 ms", "CPU s/1,000, servers")
    return table(head, rows)


def _costs(rows: Sequence[Row]) -> str:
    told = []
    for row in rows:
        base = next((each for each in rows if each["what"] == row["against"]), None)
        added = difference_of(row, base, "microseconds")
        told.append((row["what"], number(median(row, "microseconds"), ".1f"), number(added, "+.1f"), row["against"]))
    lines = ["| | µs | added | to |", "| --- | ---: | ---: | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in told)]) if told else "*Not in this run.*"


def _items(found: Found) -> str:
    rows = rows_of(found, "items")
    whole = median(next((each for each in rows if each["what"] == policy_items.METRICS), None), "microseconds")
    told = []
    for row in rows:
        value = median(row, "microseconds")
        share = value / whole if value is not None and whole else None
        told.append((row["what"], number(value), number(share, ".0%")))
    return table(("Step", "µs", "of all"), told)


def _picks(found: Found) -> str:
    head = ("Policy", "Endpoints", "µs", "by an empty call", "the call that ejects one, ms")
    return table(
        head,
        (
            (
                row["policy"].replace("_", " "),
                f"{row['endpoints']:,}",
                number(median(row, "microseconds")),
                by(ratio_of({"of": row["microseconds"]}, {"of": row["empty"]}, "of")),
                number(median(row, "rebuild_ms")),
            )
            for row in rows_of(found, "picks")
        ),
    )


def _startup(found: Found) -> str:
    python = row_of(found, "startup", what=startup.PYTHON)
    return table(
        ("", "CPU ms", "Wall ms", "MiB", "above Python, MiB"),
        (
            (
                row["what"],
                number(median(row, "cpu_ms"), ".0f"),
                number(median(row, "wall_ms"), ".0f"),
                number(median(row, "mib"), ".1f"),
                number(difference_of(row, python, "mib"), "+.1f"),
            )
            for row in rows_of(found, "startup")
        ),
    )


def _mtls(found: Found) -> str:
    bare = row_of(found, "mtls", what=mtls.BARE)
    return table(
        ("", "µs", "by httpx"),
        (
            (row["what"], number(median(row, "microseconds"), ".0f"), by(ratio_of(row, bare, "microseconds")))
            for row in rows_of(found, "mtls")
        ),
    )


def _updates(found: Found) -> str:
    peace = row_of(found, "updates", what=updates.PEACE)
    return table(
        ("", "Calls", "Changes", "p50 ms", "p99 ms", "p99 by peace", "longest ms"),
        (
            (
                row["what"],
                str(row["calls"]),
                str(row["changes"]),
                number(median(row, "p50_ms")),
                number(median(row, "p99_ms")),
                by(ratio_of(row, None if row is peace else peace, "p99_ms")),
                number(max(row["longest_ms"]), ".1f"),
            )
            for row in rows_of(found, "updates")
        ),
    )


def _decisions(found: Found) -> str:
    made = found.get("inbound", {}).get("decisions", [])
    return table(("", "µs"), ((each["what"], number(each["microseconds"], ".1f")) for each in made))


def _control_plane(found: Found) -> str:
    lines = rows_of(found, "control-plane")
    arguments = " ".join(found.get("control-plane", {}).get("arguments", []))
    if not lines:
        return "*Not in this run.*"
    command = f"`python -m benchmarks.xds_clients{' ' + arguments if arguments else ''}`:"
    return "\n".join([command, "", *map(str, lines)])


# Where the mesh loses


class Loss(NamedTuple):
    what: str
    ratio: float
    told: str


def losses(found: Found) -> list[Loss]:
    """Whatever is slower with the mesh than what it is compared with, the worst first."""
    made: list[Loss] = []

    def add(what: str, ratio: float | None, told: str = "") -> None:
        if ratio is not None and ratio >= NOTICEABLE:
            made.append(Loss(what, ratio, told))

    for section in ("calls", "grpc"):
        rows = rows_of(found, section)
        for row in rows:
            bare = bare_row(rows, row)
            if row["contestant"].startswith(calls.BARE):
                continue
            what = f"{row['client']}, {row['contestant']}, {row['concurrency']} at once"
            for field, name in (("microseconds", "time"), ("cpu", "CPU of the client")):
                add(f"{what}: {name}", ratio_of(row, bare, field), "by bare")
    bare_first, meshed_first = (
        row_of(found, "startup", what=what) for what in (startup.FIRST_BARE, startup.FIRST_MESHED)
    )
    for field, name in (("cpu_ms", "CPU"), ("wall_ms", "time"), ("mib", "memory")):
        unit = "MiB" if field == "mib" else "ms"
        more = difference_of(meshed_first, bare_first, field)
        add(
            f"import and first call: {name}",
            ratio_of(meshed_first, bare_first, field),
            f"by httpx: {number(more, '+.0f')} {unit}",
        )
    for row in rows_of(found, "policy"):
        if row["what"] in (policy.METRICS, policy.METRICS_ASYNC, policy.SAMPLED):
            base = row_of(found, "policy", what=row["against"])
            more = difference_of(row, base, "microseconds")
            add(row["what"], ratio_of(row, base, "microseconds"), f"by {row['against']}: {number(more, '+.1f')} µs")
    for row in rows_of(found, "gateway"):
        if row["contestant"] == gateway.GATEWAY:
            nginx = row_of(found, "gateway", concurrency=row["concurrency"], contestant=gateway.NGINX)
            what = f"the gateway, {row['concurrency']} at once: "
            add(what + "time of a request", ratio_of(row, nginx, "microseconds"), "by nginx")
            add(what + "p99", ratio_of(row, nginx, "p99_ms"), "by nginx")
    for row in rows_of(found, "inbound"):
        if row["contestant"] in (inbound.MESHED, inbound.POLICIES):
            base = row_of(found, "inbound", concurrency=row["concurrency"], contestant=inbound.TLS)
            what = f"being called, {row['contestant']}, {row['concurrency']} at once: time of a request"
            add(what, ratio_of(row, base, "microseconds"), f"by {inbound.TLS}")
    for row in rows_of(found, "instead"):
        mine = row_of(found, "instead", concurrency=row["concurrency"], contestant=instead.MESHED_TLS)
        if row["contestant"].startswith("httpx") or row["contestant"] in (instead.BY_HAND, instead.INSTRUMENTED):
            what = f"meshed with mTLS, {row['concurrency']} at once: p50"
            add(what, ratio_of(mine, row, "p50_ms"), f"by {row['contestant']}")
    return sorted(made, key=lambda loss: -loss.ratio)


def _losses(found: Found) -> str:
    told = losses(found)
    if not told:
        return "*None in this run.*"
    lines = ["| | | |", "| --- | ---: | --- |"]
    return "\n".join([*lines, *(f"| {loss.what} | {by(loss.ratio)} | {loss.told} |" for loss in told)])


# Plots


def _rates(found: Found, section: str, clients: Sequence[str], contestants: Sequence[str]) -> list[Group]:
    groups, rows = [], rows_of(found, section)
    for client in clients:
        for concurrency in sorted({row["concurrency"] for row in rows if row["client"] == client}):
            drawn = []
            for name in contestants:
                row = row_of(found, section, client=client, concurrency=concurrency, contestant=name)
                rate = None if row is None else ratio_of(bare_row(rows, row), row, "microseconds")
                if rate is not None:
                    drawn.append((name, rate))
            groups.append(Group(f"{client}, {concurrency} at once", drawn))
    return groups


def plots(found: Found) -> dict[str, str]:
    """SVG by name; none of what was not measured."""
    made: dict[str, str] = {}

    def draw(name: str, title: str, unit: str, groups: Sequence[Group], line: float | None = None) -> None:
        if any(group.bars for group in groups):
            made[name] = bars(title, unit, groups, line)

    drawn = (calls.MESHED, calls.MESHED_AIOHTTP, calls.MESHED + calls.TLS, calls.MESHED_AIOHTTP + calls.TLS)
    draw("calls", "Requests a second, meshed by bare", "x bare", _rates(found, "calls", calls.CLIENTS, drawn), 1.0)
    drawn_grpc = (grpc_calls.INTERCEPTORS, grpc_calls.CHANNEL, grpc_calls.CHANNEL + grpc_calls.TLS)
    draw(
        "grpc",
        "gRPC calls a second, meshed by bare",
        "x bare",
        _rates(found, "grpc", grpc_calls.CLIENTS, drawn_grpc),
        1.0,
    )
    added, used = [], []
    for row in rows_of(found, "instead"):
        if row["concurrency"] != 1:
            continue
        alone = row_of(found, "instead", concurrency=1, contestant=instead.ALONE)
        more = difference_of(row, alone, "p50_ms")
        if row is not alone and more is not None:
            added.append(Group(row["contestant"], [("at the median, one call at a time", more * 1e3)]))
        pair = (
            ("client", statistics.median(row["cpu"])),
            ("client, proxies and server", statistics.median(row["all_cpu"])),
        )
        used.append(Group(row["contestant"], pair))
    draw(
        "instead-latency",
        "Latency added to httpx at the median, one call at a time",
        "µs; less than nothing is no bar",
        added,
    )
    draw("instead-cpu", "CPU for 1,000 requests, one at a time", "seconds", used)
    starting = rows_of(found, "startup")
    draw(
        "startup",
        "Import and first call",
        "ms of CPU",
        [Group(row["what"], [("CPU", statistics.median(row["cpu_ms"]))]) for row in starting],
    )
    draw(
        "memory",
        "Resident after it",
        "MiB",
        [Group(row["what"], [("memory", statistics.median(row["mib"]))]) for row in starting],
    )
    rates: dict[int, list[tuple[str, float]]] = {}
    for row in rows_of(found, "gateway"):
        rate = 1e6 / statistics.median(row["microseconds"])
        rates.setdefault(row["concurrency"], []).append((row["contestant"], rate))
    through = [Group(f"{concurrency} at once", drawn) for concurrency, drawn in rates.items()]
    draw("gateway", "Requests a second through one process", "requests/s", through)
    changing = [
        Group(row["what"], [("p50", statistics.median(row["p50_ms"])), ("p99", statistics.median(row["p99_ms"]))])
        for row in rows_of(found, "updates")
    ]
    draw("updates", "Latency while configuration changes", "ms", changing)
    return made


# The page

PARTS: dict[str, Callable[[Found], str]] = {
    "header": _header,
    "sections": _sections,
    "targets": _targets,
    "losses": _losses,
    "calls": lambda found: _client_tables(found, "calls", calls.CLIENTS),
    "grpc": lambda found: _client_tables(found, "grpc", grpc_calls.CLIENTS),
    "mtls": _mtls,
    "instead": _instead,
    "inbound": lambda found: _compared(found, "inbound", inbound.TLS),
    "decisions": _decisions,
    "gateway": lambda found: _compared(found, "gateway", gateway.NGINX),
    "policy": lambda found: _costs(rows_of(found, "policy")),
    "items": _items,
    "picks": _picks,
    "startup": _startup,
    "updates": _updates,
    "control-plane": _control_plane,
}


def rendered(found: Found, drawn: Iterable[str]) -> str:
    """drawn: names of the plots that there are."""
    there = set(drawn)

    def part(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        if kind == "plot":
            return f"![{match[3].strip()}](performance/{name}.svg)" if name in there else ""
        return PARTS[name](found)

    text = re.sub(r"\{\{(table|plot) ([\w-]+)([^}]*)\}\}", part, TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def write(found: Found, page: Path) -> None:
    """The page, and its plots in a folder `performance` beside it."""
    drawn = plots(found)
    folder = page.parent / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, svg in drawn.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    page.write_text(rendered(found, drawn), encoding="utf-8")
