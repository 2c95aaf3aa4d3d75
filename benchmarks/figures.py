"""What do the rows say? Medians, ratios and differences, found by section and name; None where a row is not there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.rounds import difference, ratio

Found = dict[str, dict[str, Any]]
"""Sections by name, as run.py wrote them."""


def rows_of(found: Found, section: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = found.get(section, {}).get("rows", [])
    return rows


def row_of(found: Found, section: str, **names: Any) -> dict[str, Any] | None:
    return next((row for row in rows_of(found, section) if all(row[key] == name for key, name in names.items())), None)


def median(row: dict[str, Any] | None, field: str) -> float | None:
    return None if row is None else statistics.median(row[field])


def ratio_of(mine: dict[str, Any] | None, other: dict[str, Any] | None, field: str) -> float | None:
    """Round by round."""
    return None if mine is None or other is None else ratio(mine[field], other[field])


def difference_of(mine: dict[str, Any] | None, other: dict[str, Any] | None, field: str) -> float | None:
    return None if mine is None or other is None else difference(mine[field], other[field])


def best(rows: Sequence[dict[str, Any] | None], field: str = "microseconds") -> dict[str, Any] | None:
    """With the least median: of two bare clients the better, so that no ratio profits from a pool sized badly."""
    there = [row for row in rows if row is not None]
    return min(there, key=lambda row: statistics.median(row[field])) if there else None
