from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.charts import MOST_POINTS, Curve, chart, smooth, ticks

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
def test_any_figures_give_a_drawing_inside_its_frame(points):
    drawing = chart([Curve("a <b>", "train", points, dots=True)], 'title "<&"')
    if not any(math.isfinite(y) for _, y in points):
        assert "No figures yet" in drawing
        return
    root = ElementTree.fromstring(f"<div>{drawing}</div>")
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx", "nan")) <= 880
        assert 0 <= float(circle.get("cy", "nan")) <= 320


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(float(i), 1.0) for i in range(100_000)]
    drawing = chart([Curve("a", "train", points)], "t")
    line = ElementTree.fromstring(f"<div>{drawing}</div>").find("svg/polyline")
    assert line is not None
    places = line.get("points", "").split()
    assert len(places) <= MOST_POINTS + 1
    assert places[-1].startswith("868")


def test_smoothing_starts_unbiased_and_keeps_a_constant():
    assert [y for _, y in smooth([(i, 2.5) for i in range(50)])] == pytest.approx([2.5] * 50)
    assert smooth([(0, 1.0), (1, 3.0)])[0] == (0, 1.0)
