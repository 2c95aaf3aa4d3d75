"""How does it look? Bars, as SVG by hand: a few rectangles need no library for plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#9aa5b1", "#1f6feb", "#d9822b", "#2f9e6e", "#8a63d2")
_WIDTH, _LABEL, _VALUE, _BAR, _GAP = 760, 290, 80, 16, 12


class Group(NamedTuple):
    """Bars that are compared: (name, value)."""

    label: str
    bars: Sequence[tuple[str, float]]


def told(value: float) -> str:
    """Three digits, and none of a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bars(title: str, unit: str, groups: Sequence[Group], line: float | None = None) -> str:
    """An SVG document. The bars' names are the legend, in the order of their first use; line: a value to be marked."""
    names = list(dict.fromkeys(name for group in groups for name, _ in group.bars))
    longest = max([value for group in groups for _, value in group.bars] + [line or 0.0, 1e-9])
    scale = (_WIDTH - _LABEL - _VALUE) / longest
    parts, y = [], 56 + (18 * ((len(names) + 1) // 2) if len(names) > 1 else -10)
    top = y
    for group in groups:
        middle = y + _BAR * len(group.bars) / 2 + 4
        parts.append(f'<text x="{_LABEL - 8}" y="{middle:.1f}" text-anchor="end">{escape(group.label)}</text>')
        for name, value in group.bars:
            # Where there is one bar each, colour says which are the mesh's.
            at = names.index(name) if len(names) > 1 else int("mesh" in group.label)
            colour = COLOURS[at % len(COLOURS)]
            width = max(1.0, max(0.0, value) * scale)
            parts.append(
                f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{colour}">'
                f"<title>{escape(f'{group.label}, {name}: {told(value)} {unit}')}</title></rect>"
                f'<text x="{_LABEL + width + 5:.1f}" y="{y + 11}">{told(value)}</text>'
            )
            y += _BAR
        y += _GAP
    if line is not None:
        x = _LABEL + line * scale
        parts.append(f'<path d="M{x:.1f} {top - 4}V{y - _GAP + 4}" stroke="#444" stroke-dasharray="3 3"/>')
    legend = []
    for number, name in enumerate(names if len(names) > 1 else ()):
        x, at = 20 + 370 * (number % 2), 48 + 18 * (number // 2)
        colour = COLOURS[number % len(COLOURS)]
        legend.append(f'<rect x="{x}" y="{at - 10}" width="12" height="12" fill="{colour}"/>')
        legend.append(f'<text x="{x + 18}" y="{at}">{escape(name)}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="12" fill="#24292f">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{_WIDTH}" height="{y}" fill="#ffffff"/>',
            f'<text x="20" y="24" font-size="15" font-weight="600">{escape(title)} ({escape(unit)})</text>',
            *legend,
            *parts,
            "</svg>",
            "",
        ]
    )
