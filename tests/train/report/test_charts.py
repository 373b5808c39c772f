from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.report.charts import LEFT, MAX_POINTS, RIGHT, WIDTH, Cloud, Curve, chart, scatter, smooth, ticks

numbers = st.floats(-1e6, 1e6)


@given(numbers, numbers)
def test_ticks_cover_the_range_in_a_few_round_steps(one, two):
    low, high = min(one, two), max(one, two)
    marks = ticks(low, high)
    slack = 1e-6 * max(1, abs(low), abs(high))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= 9


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(width=32)), max_size=40))
def test_charts_of_any_values_stay_inside_the_frame(points):
    drawing = chart([Curve("a <b>", "train", points, dots=True)], 'title "<&"')
    if not any(math.isfinite(y) for _, y in points):
        assert not drawing
        return
    root = ElementTree.fromstring(f"<div>{drawing}</div>")
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx", "nan")) <= WIDTH
        assert 0 <= float(circle.get("cy", "nan")) <= 300


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(float(i), 1.0) for i in range(100_000)]
    drawing = chart([Curve("a", "train", points)], "t")
    line = ElementTree.fromstring(f"<div>{drawing}</div>").find("figure/svg/polyline")
    assert line is not None
    places = line.get("points", "").split()
    assert len(places) <= MAX_POINTS + 1
    assert places[-1].startswith(f"{WIDTH - RIGHT}")


def test_smoothing_starts_unbiased_and_keeps_a_constant():
    assert [y for _, y in smooth([(i, 2.5) for i in range(50)])] == pytest.approx([2.5] * 50)
    assert smooth([(0, 1.0), (1, 3.0)])[0] == (0, 1.0)


def test_axes_have_units_curves_have_distinct_dashes_and_marks_have_tooltips():
    curves = [Curve(name, f"c{i}", [(1, 2.0), (2, 1.5)], dots=True) for i, name in enumerate("abc")]
    root = ElementTree.fromstring(f"<div>{chart(curves, 'losses', 'step', 'nats')}</div>")
    assert [p.text for p in root.iter("p")] == ["nats", "step"]
    dashes = {line.get("class", "").split()[-1] for line in root.iter("polyline")}
    assert len(dashes) == 3
    assert [item.find("svg").tail for item in root.iter("li")] == ["a", "b", "c"]
    tooltips = [title.text for circle in root.iter("circle") for title in circle]
    assert tooltips[1] == "a: 1.5 at step 2"


def test_a_long_curve_has_tooltips_at_some_points():
    drawing = chart([Curve("a", "c0", [(float(i), 1.0) for i in range(1000)])], "t")
    assert 30 <= drawing.count("<circle") <= 61


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_clouds_lie_inside_the_axes_and_have_distinct_shapes(points):
    clouds = [Cloud(str(i), f"c{i}", points, [f"<{x}>" for x, _ in points], shape=i) for i in range(4)]
    root = ElementTree.fromstring(f"<div>{scatter(clouds, 't', 'x', 'y')}</div>")
    marks = [mark for mark in root.find("figure/svg") or () if mark.get("class", "").startswith("mark")]
    assert len(marks) == 4 * len(points)
    for mark in marks:
        if mark.tag == "circle":
            assert LEFT <= float(mark.get("cx", "nan")) <= WIDTH - RIGHT
    assert {len(mark.get("points", "").split()) for mark in marks} == {0, 4, 3}
