"""Charts as inline SVG: no script, no plotting library.

In: curves as (x, y) points, or points of several groups. Out: one ``<figure>`` (``templates/chart.html.j2``) with axes,
their units, a legend, and a tooltip (``<title>``) on every mark. Colours are classes of ``templates/report.css``.
Curves differ in their dashes and groups in their shapes as well, so that nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

from markupsafe import Markup

from train.report.page import render

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 60, 14, 12, 34
MAX_POINTS = 1200  # drawn of a curve; more cannot be told apart
TOOLTIPS = 60  # of a curve without dots
NOTHING = Markup('<p class="note">No data yet.</p>')

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
    texts: Sequence[str] = field(default_factory=list)
    shape: int = 0
    radius: float = 3.5


@dataclass(frozen=True)
class Mark:
    """A circle at a place in the drawing, or where it has ``corners`` a polygon, with the text of its tooltip."""

    style: str
    x: float
    y: float
    radius: float
    text: str
    corners: str = ""


@dataclass(frozen=True)
class Layer:
    """A curve or a cloud as the template draws it; a curve has ``points``, a cloud the mark ``key`` in the legend."""

    name: str
    marks: list[Mark]
    style: str = ""
    points: str = ""
    key: Mark | None = None


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


def chart(curves: Sequence[Curve], title: str, x_label: str = "step", y_label: str = "", height: int = 300) -> Markup:
    """The curves on shared axes from 0; a sentence instead when none has a point. What is not finite is left out."""
    curves = [Curve(c.name, c.style, _thin(_finite(c.points)), c.dots) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return NOTHING
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(0.0, *ys), max(ys), max(2, height // 50))
    frame = Frame(0.0, max(max(xs), 1.0), y_ticks[0], max(y_ticks[-1], max(ys)), height)
    layers = []
    for curve, dash in zip(curves, _dashes(curves), strict=True):
        places = [frame.at(x, y) for x, y in curve.points]
        dots = curve.dots or len(places) == 1
        style, radius, every = (curve.style, 3.5, 1) if dots else ("unseen", 7, -(-len(places) // TOOLTIPS))
        marks = [
            Mark(style, *place, radius, f"{curve.name}: {y:.4g} at {x_label} {x:,.10g}")
            for (x, y), place in list(zip(curve.points, places, strict=True))[::every]
        ]
        line = " ".join(f"{x},{y}" for x, y in places)
        layers.append(Layer(curve.name, marks, f"{curve.style} {dash}", line))
    return _render_chart(title, frame, [x for x in x_ticks if x <= frame.x_high], y_ticks, layers, x_label, y_label)


def scatter(clouds: Sequence[Cloud], title: str, x_label: str, y_label: str, height: int = 440) -> Markup:
    """The clouds on shared axes, the first at the back."""
    xs = [x for cloud in clouds for x, _ in cloud.points]
    ys = [y for cloud in clouds for _, y in cloud.points]
    if not xs:
        return NOTHING
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    frame = Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1], height)
    layers = []
    for cloud in clouds:
        texts = list(cloud.texts) or [cloud.name] * len(cloud.points)
        marks = [_mark(cloud, *frame.at(*point), text) for point, text in zip(cloud.points, texts, strict=True)]
        layers.append(Layer(cloud.name, marks, key=_mark(cloud, 16, 5, cloud.name)))
    return _render_chart(title, frame, x_ticks, y_ticks, layers, x_label, y_label)


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


def _dashes(curves: Sequence[Curve]) -> list[str]:
    """A class of its own for each of four curves; a faint one, which stands behind its smoothed self, has none."""
    kinds = cycle(range(4))
    return ["" if curve.style == "faint" else f"dash{next(kinds)}" for curve in curves]


def _mark(cloud: Cloud, x: float, y: float, text: str) -> Mark:
    """Circle, square, triangle or diamond around a place."""
    r = cloud.radius
    corners = (
        [],
        [(-r, -r), (r, -r), (r, r), (-r, r)],
        [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    )[cloud.shape % 4]
    path = " ".join(f"{x + across:.1f},{y + down:.1f}" for across, down in corners)
    return Mark(f"mark {cloud.style}", x, y, r, text, path)


def _render_chart(
    title: str,
    frame: Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    layers: Sequence[Layer],
    x_label: str,
    y_label: str,
) -> Markup:
    return render(
        "chart.html.j2",
        title=title,
        width=WIDTH,
        height=frame.height,
        left=LEFT,
        right=WIDTH - RIGHT,
        x_ticks=[(frame.at(value, frame.y_low)[0], f"{value:,.10g}") for value in x_ticks],
        y_ticks=[(frame.at(frame.x_low, value)[1], f"{value:g}") for value in y_ticks],
        layers=layers,
        x_label=x_label,
        y_label=y_label,
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Every n-th point and the last, so that a long run stays a small page."""
    every = -(-len(points) // MAX_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
