"""How are rows shown? As kubectl shows them: upper-case headers, three spaces between columns, no trailing ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    padded = ((cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("   ".join(cells).rstrip() for cells in padded)


def age(seconds: float) -> str:
    """`7s`, `2m5s`, `3h`, `2d`: two units while they are small, as kubectl does."""
    left = max(0, int(seconds))
    if left < 120:
        return f"{left}s"
    if left < 600:
        return f"{left // 60}m{left % 60}s" if left % 60 else f"{left // 60}m"
    if left < 3 * 3600:
        return f"{left // 60}m"
    if left < 8 * 3600:
        return f"{left // 3600}h{left % 3600 // 60}m" if left % 3600 // 60 else f"{left // 3600}h"
    if left < 48 * 3600:
        return f"{left // 3600}h"
    if left < 8 * 86400:
        hours = left % 86400 // 3600
        return f"{left // 86400}d{hours}h" if hours else f"{left // 86400}d"
    if left < 2 * 365 * 86400:
        return f"{left // 86400}d"
    return f"{left // (365 * 86400)}y"
