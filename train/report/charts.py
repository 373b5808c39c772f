"""Charts as inline SVG, without scripts or a plotting library.

Takes curves of (x, y) points, or groups of points; returns a ``<figure>`` (``templates/chart.html.j2``) with labeled
axes, a legend, and a tooltip (``<title>``) on every mark. Colors are classes of ``templates/report.css``. Curves also
differ in their dashes and groups in their shapes, so that nothing depends on color alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

from markupsafe import Markup

from train.report.page import render

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 60, 14, 12, 34
MAX_POINTS = 1200  # per curve; more would be indistinguishable
TOOLTIPS = 60  # per curve without dots
SMALL = 440  # width of a chart beside another

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line. ``style`` is a CSS class; ``dots`` draws a dot at every point."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Cloud:
    """A group of points. ``texts`` are their tooltips (default: the name); ``shape`` is an index, see :func:`_mark`."""

    name: str
    style: str
    points: Sequence[Point]
    texts: Sequence[str] = field(default_factory=list)
    shape: int = 0
    radius: float = 3.5


@dataclass(frozen=True)
class Mark:
    """A circle at (x, y) in SVG units, or a polygon if ``corners`` is set; ``text`` is its tooltip."""

    style: str
    x: float
    y: float
    radius: float
    text: str
    corners: str = ""


@dataclass(frozen=True)
class Layer:
    """A curve or a cloud as the template draws it. A curve has ``points``; a cloud has ``key``, its legend mark."""

    name: str
    marks: list[Mark]
    style: str = ""
    points: str = ""
    key: Mark | None = None


@dataclass(frozen=True)
class Frame:
    """Maps data values to a drawing that is ``width`` wide and ``height`` high."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int
    width: int = WIDTH

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a data point in SVG units."""
        svg_x = LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT)
        svg_y = self.height - BOTTOM - (y - self.y_low) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM)
        return round(svg_x, 1), round(svg_y, 1)


def chart(curves: Sequence[Curve], title: str, x_label: str = "step", y_label: str = "", height: int = 300) -> Markup:
    """Draw curves on shared axes that include 0; values that are not finite are omitted.

    Returns nothing if no curve has a point.
    """
    curves = [Curve(c.name, c.style, _subsample(_finite(c.points)), c.dots) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup()
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(0.0, *ys), max(ys), max(2, height // 50))
    frame = Frame(0.0, max(max(xs), 1.0), y_ticks[0], max(y_ticks[-1], max(ys)), height)
    layers = []
    for curve, dash in zip(curves, _dashes(curves), strict=True):
        positions = [frame.at(x, y) for x, y in curve.points]
        dots = curve.dots or len(positions) == 1
        style, radius, every = (curve.style, 3.5, 1) if dots else ("unseen", 7, -(-len(positions) // TOOLTIPS))
        marks = [
            Mark(style, *position, radius, f"{curve.name}: {y:.4g} at {x_label} {x:,.10g}")
            for (x, y), position in list(zip(curve.points, positions, strict=True))[::every]
        ]
        line = " ".join(f"{x},{y}" for x, y in positions)
        layers.append(Layer(curve.name, marks, f"{curve.style} {dash}", line))
    return _render_chart(title, frame, [x for x in x_ticks if x <= frame.x_high], y_ticks, layers, x_label, y_label)


def scatter(clouds: Sequence[Cloud], title: str, x_label: str, y_label: str, height: int = 360) -> Markup:
    """Draw clouds on shared axes, the first at the back, without points that are not finite; ``SMALL`` wide.

    Returns nothing if there are no points.
    """
    clouds = [_finite_cloud(cloud) for cloud in clouds]
    xs = [x for cloud in clouds for x, _ in cloud.points]
    ys = [y for cloud in clouds for _, y in cloud.points]
    if not xs:
        return Markup()
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    frame = Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1], height, SMALL)
    layers = []
    for cloud in clouds:
        marks = [_mark(cloud, *frame.at(*point), text) for point, text in zip(cloud.points, cloud.texts, strict=True)]
        layers.append(Layer(cloud.name, marks, key=_mark(cloud, 16, 5, cloud.name)))
    return _render_chart(title, frame, x_ticks, y_ticks, layers, x_label, y_label)


def smooth(points: Sequence[Point], span: int = 0) -> list[Point]:
    """Return the exponential moving average over about ``span`` points, with bias correction at the start.

    ``span`` 0 means a fortieth of the points.
    """
    weight = 2 / ((span or max(2, len(points) // 40)) + 1)
    average, total, result = 0.0, 0.0, []
    for x, y in points:
        average, total = average * (1 - weight) + y * weight, total * (1 - weight) + weight
        result.append((x, average / total))
    return result


def ticks(low: float, high: float, max_steps: int = 6) -> list[float]:
    """Return round values that cover ``low`` to ``high``.

    Their step is 1, 2 or 5 times a power of ten; there are about ``max_steps`` steps at most.
    """
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):  # a single value, up to rounding
        high = low + max(1.0, abs(low))
    min_step = (high - low) / max_steps
    power = 10 ** math.floor(math.log10(min_step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= min_step)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _dashes(curves: Sequence[Curve]) -> list[str]:
    """Return the CSS dash class of each curve: four in turn, none for a faint curve behind its smoothed version."""
    kinds = cycle(range(4))
    return ["" if curve.style == "faint" else f"dash{next(kinds)}" for curve in curves]


def _mark(cloud: Cloud, x: float, y: float, text: str) -> Mark:
    """Return a circle, square, triangle or diamond (``cloud.shape`` 0 to 3) centered at (x, y)."""
    r = cloud.radius
    corners = (
        [],
        [(-r, -r), (r, -r), (r, r), (-r, r)],
        [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
    )[cloud.shape % 4]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
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
        width=frame.width,
        height=frame.height,
        left=LEFT,
        right=frame.width - RIGHT,
        x_ticks=[(frame.at(value, frame.y_low)[0], f"{value:,.10g}") for value in x_ticks],
        y_ticks=[(frame.at(frame.x_low, value)[1], f"{value:g}") for value in y_ticks],
        layers=layers,
        x_label=x_label,
        y_label=y_label,
    )


def _finite_cloud(cloud: Cloud) -> Cloud:
    texts = list(cloud.texts) or [cloud.name] * len(cloud.points)
    kept = [(point, text) for point, text in zip(cloud.points, texts, strict=True) if all(map(math.isfinite, point))]
    return replace(cloud, points=[point for point, _ in kept], texts=[text for _, text in kept])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _subsample(points: Sequence[Point]) -> Sequence[Point]:
    """Return every n-th point and the last one, which limits the size of the page."""
    every = -(-len(points) // MAX_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
