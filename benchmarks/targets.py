"""Is it as fast as it should be? Every target, and what the run says of it; nothing here is known beforehand."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import calls, instead, policy, startup, updates
from benchmarks.figures import Found, best, difference_of, median, ratio_of, row_of, rows_of


class Target(NamedTuple):
    """measured: in words; is_met: None where the run has no figure for it."""

    what: str
    wanted: str
    measured: str
    is_met: bool | None


def _target(what: str, wanted: str, value: float | None, limit: float, told: str, *, least: bool = False) -> Target:
    """told: of the value, to be formatted. least: the limit is the least that is wanted, else the most."""
    if value is None:
        return Target(what, wanted, "not in this run", None)
    return Target(what, wanted, told.format(value), value >= limit if least else value <= limit)


def _policy(found: Found) -> Iterator[Target]:
    def row(what: str) -> dict[str, Any] | None:
        return row_of(found, "policy", what=what)

    for kind, what, most in (("async", policy.METRICS_ASYNC, 10), ("sync", policy.METRICS, 8)):
        value = median(row(what), "microseconds")
        yield _target(
            f"policy of a call with metrics, over a mock, {kind}", f"{most} µs (moonshot 5)", value, most, "{:.1f} µs"
        )
    for told, what, most in (
        ("unsampled tracing adds", policy.UNSAMPLED, 3),
        ("a sampled span adds", policy.SAMPLED, 60),
        ("a failed attempt adds, besides its back-off", policy.FAILED, 10),
    ):
        value = difference_of(row(what), row(policy.METRICS), "microseconds")
        yield _target(told, f"{most} µs", value, most, "{:.1f} µs")
    picked = [each for each in rows_of(found, "picks") if each["endpoints"] == 10_000]
    least = next((each for each in picked if each["policy"] == "least_request"), None)
    slowest = max(picked, key=lambda each: statistics.median(each["microseconds"]), default=None)
    told = "{:.2f} µs"
    if slowest is not None:
        told += f" (the slowest policy, {slowest['policy']}: {statistics.median(slowest['microseconds']):.2f})"
    yield _target("a pick among 10,000 endpoints (least request)", "2 µs", median(least, "microseconds"), 2, told)


def bare_of(found: Found, client: str, concurrency: int, tls: str = "") -> dict[str, Any] | None:
    """The faster of the bare clients."""
    names = (calls.DEFAULT_POOL + tls, calls.BARE + tls)
    rows = [row_of(found, "calls", client=client, concurrency=concurrency, contestant=name) for name in names]
    return best(rows)


def _calls(found: Found) -> Iterator[Target]:
    def row(client: str, concurrency: int, contestant: str) -> dict[str, Any] | None:
        return row_of(found, "calls", client=client, concurrency=concurrency, contestant=contestant)

    for client in ("httpx, sync", "httpx, async"):
        value = ratio_of(row(client, 1, calls.MESHED), bare_of(found, client, 1), "microseconds")
        yield _target(f"a meshed call of {client}, by a bare one, at concurrency 1", "1.00", value, 1.0, "{:.2f}")
    for contestant, engine, limits in (
        (calls.MESHED, "httpcore", {32: 2, 128: 10}),
        (calls.MESHED_AIOHTTP, "aiohttp", {32: 9, 128: 50}),
    ):
        for concurrency, limit in limits.items():
            mine = row("httpx, async", concurrency, contestant)
            value = ratio_of(row("httpx, async", concurrency, calls.BARE), mine, "microseconds")  # the same limits
            default = ratio_of(row("httpx, async", concurrency, calls.DEFAULT_POOL), mine, "microseconds")
            told = "{:.1f}" + (f" (by its default pool: {default:.1f})" if default is not None else "")
            what = (
                f"requests of httpx async by bare ones, {engine}'s connections, all kept, at concurrency {concurrency}"
            )
            yield _target(what, f"at least {limit}", value, limit, told, least=True)
    for client in ("httpx, sync", "httpx, async"):
        pair = row(client, 1, calls.MESHED + calls.TLS), row(client, 1, calls.MESHED)
        cpu = ratio_of(*pair, "cpu")
        told = "{:.2f}" + (f" (its CPU: {cpu:.2f})" if cpu is not None else "")
        value = ratio_of(*pair, "microseconds")
        yield _target(f"a meshed call of {client} with mTLS, by one in plaintext", "1.35", value, 1.35, told)


def _instead(found: Found) -> Iterator[Target]:
    def added(contestant: str) -> float | None:
        alone = row_of(found, "instead", concurrency=1, contestant=instead.ALONE)
        mine = row_of(found, "instead", concurrency=1, contestant=contestant)
        milliseconds = difference_of(mine, alone, "p50_ms")
        return None if milliseconds is None else milliseconds * 1e3

    mesh, envoy = added(instead.MESHED_TLS), added(instead.pair("Envoy"))
    what = "latency that an Envoy pair adds by what the mesh adds with mTLS, at concurrency 1"
    if mesh is None or envoy is None:
        yield Target(what, "at least 40", "not in this run", None)
        return
    told = f"Envoy {envoy:+.0f} µs, the mesh {mesh:+.0f} µs at the median"
    if mesh <= 0:
        yield Target(what, "at least 40", f"{told}: less than nothing is added", envoy > 0)
    else:
        yield Target(what, "at least 40", f"{envoy / mesh:.1f} ({told})", envoy / mesh >= 40)


def _startup(found: Found) -> Iterator[Target]:
    python, imported = (row_of(found, "startup", what=what) for what in (startup.PYTHON, startup.IMPORT))
    wall = difference_of(imported, python, "wall_ms")
    cpu = difference_of(imported, python, "cpu_ms")
    told = "{:.0f} ms" + (f" ({cpu:.0f} ms of CPU)" if cpu is not None else "")
    yield _target("`import meshlib`, no client library loaded", "60 ms", wall, 60, told)
    bare, meshed = (row_of(found, "startup", what=what) for what in (startup.FIRST_BARE, startup.FIRST_MESHED))
    mib = difference_of(meshed, bare, "mib")
    alone = difference_of(imported, python, "mib")
    told = "{:.1f} MiB" + (f" (by the import alone: {alone:.1f})" if alone is not None else "")
    yield _target("memory above a bare process, after a first call", "15 MB (14.3 MiB)", mib, 15e6 / 1024**2, told)


def _updates(found: Found) -> Iterator[Target]:
    told, not_told, peace = (
        row_of(found, "updates", what=what) for what in (updates.TOLD, updates.NOT_TOLD, updates.PEACE)
    )
    value, by_peace = ratio_of(told, not_told, "p99_ms"), ratio_of(told, peace, "p99_ms")
    words = "{:.2f}" + (
        f" (by that in peace, with the control plane on the same cores: {by_peace:.2f})" if by_peace else ""
    )
    what = "p99 of calls while 1,000 endpoints change, by that while they change for others"
    yield _target(what, "1.10", value, 1.10, words)


def targets(found: Found) -> list[Target]:
    return [target for part in (_policy, _calls, _instead, _startup, _updates) for target in part(found)]
