"""Line charts as inline SVG text, written by hand: no script, no library.

In: curves as (x, y) points. Out: one ``<svg>`` with axes and a legend below it. Colours are CSS classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 880, 48, 12, 12, 30
MOST_POINTS = 1200  # drawn of a curve; more cannot be told apart

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line; ``style`` is a CSS class; ``dots`` marks each point."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


def chart(curves: Sequence[Curve], title: str, height: int = 320) -> str:
    """The curves on shared axes; a sentence instead when none has a point. Values that are not finite are left out."""
    curves = [Curve(c.name, c.style, _thin(_finite(c.points)), c.dots) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return '<p class="note">No figures yet.</p>'
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(0.0, *ys), max(ys))
    x_low, x_high = 0.0, max(max(xs), 1.0)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for value in y_ticks:
        _, y = at(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        if value <= x_high:
            x, _ = at(value, y_low)
            parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{value:,.10g}</text>')
    for curve in curves:
        places = [at(x, y) for x, y in curve.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="curve {curve.style}" points="{path}"/>')
        if curve.dots or len(places) == 1:
            style = "train" if curve.style == "faint" else curve.style
            parts.extend(f'<circle class="{style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places)
    return "".join(parts) + "</svg>" + _legend(curves)


def smooth(points: Sequence[Point], span: int = 0) -> list[Point]:
    """Exponential moving average over about ``span`` points (0: a fortieth of them), unbiased at the start."""
    weight = 2 / ((span or max(2, len(points) // 40)) + 1)
    average, total, result = 0.0, 0.0, []
    for x, y in points:
        average, total = average * (1 - weight) + y * weight, total * (1 - weight) + weight
        result.append((x, average / total))
    return result


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values that cover ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten, at most about ``most``."""
    if high <= low:
        high = low + max(1.0, abs(low))
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _legend(curves: Sequence[Curve]) -> str:
    items = "".join(
        '<li><svg viewBox="0 0 32 10" aria-hidden="true">'
        f'<line class="curve {c.style}" x1="0" x2="32" y1="5" y2="5"/></svg>{escape(c.name)}</li>'
        for c in curves
    )
    return f'<ul class="legend">{items}</ul>'


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Every n-th point and the last, so that a long run stays a small page."""
    every = -(-len(points) // MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
