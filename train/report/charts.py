"""Charts as inline SVG in HTML text, written by hand: no script, no library.

In: curves as (x, y) points, or points of several groups. Out: one ``<figure>`` with axes, their units, a legend, and a
tooltip (``<title>``) on every mark. Colours are CSS classes (``train/report/page.py``); curves differ in their dashes
and groups in their shapes as well, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import cycle

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 60, 14, 12, 34
MOST_POINTS = 1200  # drawn of a curve; more cannot be told apart
TOLD_POINTS = 60  # of a curve without dots, that have a tooltip

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line; ``style`` is a CSS class; ``dots`` marks each point."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Cloud:
    """Points of one group, each with the text of its tooltip; ``shape`` counts through SHAPES."""

    name: str
    style: str
    points: Sequence[Point]
    told: Sequence[str] = field(default_factory=list)
    shape: int = 0
    radius: float = 3.5


@dataclass(frozen=True)
class Frame:
    """Where values lie in a drawing ``WIDTH`` wide and ``height`` high."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A value's place in the drawing."""
        across = LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        down = self.height - BOTTOM - (y - self.y_low) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM)
        return round(across, 1), round(down, 1)


def chart(curves: Sequence[Curve], title: str, x_label: str = "step", y_label: str = "", height: int = 300) -> str:
    """The curves on shared axes from 0; a sentence instead when none has a point. What is not finite is left out."""
    curves = [Curve(c.name, c.style, _thin(_finite(c.points)), c.dots) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return '<p class="note">No figures yet.</p>'
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(0.0, *ys), max(ys), max(2, height // 50))
    frame = Frame(0.0, max(max(xs), 1.0), y_ticks[0], max(y_ticks[-1], max(ys)), height)
    parts = [*_axes(frame, [x for x in x_ticks if x <= frame.x_high], y_ticks)]
    dashes = _dashes(curves)
    for curve, dash in zip(curves, dashes, strict=True):
        places = [frame.at(x, y) for x, y in curve.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="curve {curve.style} {dash}" points="{path}"/>')
        marked = curve.dots or len(places) == 1
        every = 1 if marked else -(-len(places) // TOLD_POINTS)
        look = curve.style if marked else "unseen"
        for (x, y), (across, down) in list(zip(curve.points, places, strict=True))[::every]:
            told = f"{curve.name}: {y:.4g} at {x_label} {x:,.10g}"
            radius = 3.5 if marked else 7
            parts.append(
                f'<circle class="{look}" cx="{across}" cy="{down}" r="{radius}"><title>{escape(told)}</title></circle>'
            )
    keys = [(c.name, f'<line class="curve {c.style} {dash}" x1="0" x2="32" y1="5" y2="5"/>')
            for c, dash in zip(curves, dashes, strict=True)]  # fmt: skip
    return _figure(title, height, parts, keys, x_label, y_label)


def scatter(clouds: Sequence[Cloud], title: str, x_label: str, y_label: str, height: int = 440) -> str:
    """The clouds on shared axes, the first at the back."""
    xs = [x for cloud in clouds for x, _ in cloud.points]
    ys = [y for cloud in clouds for _, y in cloud.points]
    if not xs:
        return '<p class="note">No figures yet.</p>'
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    frame = Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1], height)
    parts = [*_axes(frame, x_ticks, y_ticks)]
    for cloud in clouds:
        told = list(cloud.told) or [cloud.name] * len(cloud.points)
        for point, text in zip(cloud.points, told, strict=True):
            parts.append(_mark(cloud, *frame.at(*point), text))
    keys = [(cloud.name, _mark(cloud, 16, 5, cloud.name)) for cloud in clouds]
    return _figure(title, height, parts, keys, x_label, y_label)


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
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):  # one value, but for rounding
        high = low + max(1.0, abs(low))
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _axes(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        _, y = frame.at(frame.x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x, _ = frame.at(value, frame.y_low)
        side = "end" if x > WIDTH - 40 else "middle"
        parts.append(f'<text x="{x}" y="{frame.height - 8}" text-anchor="{side}">{value:,.10g}</text>')
    return parts


def _dashes(curves: Sequence[Curve]) -> list[str]:
    """A class of its own for each of four curves; a faint one, which stands behind its smoothed self, has none."""
    kinds = cycle(range(4))
    return ["" if curve.style == "faint" else f"dash{next(kinds)}" for curve in curves]


def _mark(cloud: Cloud, x: float, y: float, told: str) -> str:
    """Circle, square, triangle or diamond around a place."""
    r, end = cloud.radius, f"<title>{escape(told)}</title>"
    if cloud.shape % 4 == 0:
        return f'<circle class="mark {cloud.style}" cx="{x}" cy="{y}" r="{r}">{end}</circle>'
    corners = (
        [(-r, -r), (r, -r), (r, r), (-r, r)],
        [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    )[cloud.shape % 4 - 1]
    path = " ".join(f"{x + across:.1f},{y + down:.1f}" for across, down in corners)
    return f'<polygon class="mark {cloud.style}" points="{path}">{end}</polygon>'


def _figure(
    title: str, height: int, parts: Sequence[str], keys: Sequence[tuple[str, str]], x_label: str, y_label: str
) -> str:
    legend = "".join(
        f'<li><svg viewBox="0 0 32 10" aria-hidden="true">{mark}</svg>{escape(name)}</li>' for name, mark in keys
    )
    return (
        f'<figure><p class="axis">{escape(y_label)}</p><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(parts)}</svg>'
        f'<p class="axis across">{escape(x_label)}</p><ul class="legend">{legend}</ul></figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Every n-th point and the last, so that a long run stays a small page."""
    every = -(-len(points) // MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
