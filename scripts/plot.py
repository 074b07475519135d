"""Line charts as SVG text, from the standard library alone: a result file redraws to the same bytes everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6e4f", "#d1495b", "#30638e", "#edae49", "#6c4f77", "#7a7a7a")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 250, 52, 12, 28, 38


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend and its points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: title, axis labels, curves, and whether an axis is logarithmic."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = True
    log_y: bool = True


def figure(panels: Sequence[Panel], columns: int = 3) -> str:
    """All panels in a grid with one legend; colours follow the order in which names first appear."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    columns = max(1, min(columns, len(panels)))
    width, height = columns * WIDTH, math.ceil(len(panels) / columns) * HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        "<style>text {font: 11px sans-serif}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({index % columns * WIDTH} {index // columns * HEIGHT})">')
        parts += _panel(panel, names)
        parts.append("</g>")
    x = LEFT
    for name in names:
        parts.append(f'<rect x="{x}" y="{height - 20}" width="14" height="4" fill="{_colour(names, name)}"/>')
        parts.append(f'<text x="{x + 19}" y="{height - 14}">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, names: Sequence[str]) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    title = f'<text x="{LEFT}" y="16" font-weight="bold">{escape(panel.title)}</text>'
    if not points:
        return [title, f'<text x="{LEFT}" y="60" fill="#777">nothing measured</text>']
    x_of = _axis([x for x, _ in points], panel.log_x, LEFT, WIDTH - RIGHT)
    y_of = _axis([y for _, y in points], panel.log_y, HEIGHT - BOTTOM, TOP)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [title, f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#333"/>']
    for value in _ticks([x for x, _ in points], panel.log_x, 2.0):
        parts.append(f'<text x="{x_of(value):.1f}" y="{bottom + 14}" text-anchor="middle">{_short(value)}</text>')
    for value in _ticks([y for _, y in points], panel.log_y, 10.0):
        parts.append(f'<path d="M{LEFT} {y_of(value):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y_of(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    across, down = (LEFT + right) / 2, (TOP + bottom) / 2
    parts += [
        f'<text x="{across}" y="{bottom + 30}" text-anchor="middle">{escape(panel.x_label)}</text>',
        f'<text transform="translate(12 {down}) rotate(-90)" text-anchor="middle">{escape(panel.y_label)}</text>',
    ]
    for line in panel.lines:
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in line.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{_colour(names, line.name)}" stroke-width="2"/>')
    return parts


def _axis(values: Sequence[float], log: bool, start: float, end: float):  # type: ignore[no-untyped-def]
    scale = math.log if log else float
    low, high = scale(min(values)), scale(max(values))
    span = (high - low) or 1.0
    return lambda value: start + (scale(value) - low) / span * (end - start)


def _ticks(values: Sequence[float], log: bool, base: float) -> list[float]:
    low, high = min(values), max(values)
    if log:
        first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
        ticks = [base**power for power in range(first, last + 1)]
        return ticks[:: math.ceil(len(ticks) / 8)] if len(ticks) > 1 else sorted({low, high})
    return [low + (high - low) * step / 4 for step in range(5)] if high > low else [low]


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _short(value: float) -> str:
    if value >= 1024 and math.log2(value).is_integer():
        return f"{value / 1024:g}k"
    return f"{value:.3g}"
