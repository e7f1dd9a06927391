import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.plots.bars import Bar, percentile_bars
from loadtests.plots.canvas import CHARACTER, Axis, flow, label_span, lanes, latency_axis, palette, time_ticks
from loadtests.plots.curves import TOP, distribution_curves
from loadtests.plots.timeline import INSIDE, MAX_DOTS, Band, Dots, Line, Rug, timeline
from loadtests.plots.working_set_curve import working_set_curve
from loadtests.record import Mark
from loadtests.stats import Distribution, Estimate, describe
from loadtests.working_set import Cliff, Row, WorkingSet

SPANS = st.lists(st.tuples(st.floats(0, 900), st.floats(1, 300)).map(lambda span: (span[0], span[0] + span[1])))
BANDS = [
    Band("warm-up", False, 0.0, 10.0),
    Band("steady", True, 10.0, 60.0, p95_s=0.4, limit_s=0.3),
    Band("chaos", True, 60.0, 100.0, p95_s=0.2),
]


def elements(drawing: str, css: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(drawing)  # noqa: S314  our own text
    return [element for element in root.iter() if css in (element.get("class") or "").split()]


def words(drawing: str, css: str) -> list[str]:
    return [element.text or "" for element in elements(drawing, css)]


@given(SPANS)
def test_labels_in_a_lane_never_overlap_and_no_lane_is_wasted(spans: list[tuple[float, float]]) -> None:
    rows = lanes(spans)
    for row in set(rows):
        placed = sorted(span for span, at in zip(spans, rows, strict=True) if at == row)
        assert all(end <= start for (_, end), (start, _) in pairwise(placed))
    deepest = max((sum(start <= x < end for start, end in spans) for x, _ in spans), default=0)
    assert len(set(rows)) == deepest


@given(st.lists(st.text("abc", min_size=1, max_size=20)))
def test_the_labels_of_a_key_follow_each_other_and_wrap(names: list[str]) -> None:
    places = flow(names, 50.0, 400.0)
    for name, (x, _) in zip(names, places, strict=True):
        assert 50.0 <= x <= 400.0 - len(name) * CHARACTER
    for (name, (x, row)), (_, (after, next_row)) in pairwise(zip(names, places, strict=True)):
        assert next_row == row + 1 or (next_row == row and after > x + len(name) * CHARACTER)


def test_a_label_at_the_right_edge_moves_left_to_fit() -> None:
    start, end = label_span(990.0, "neighbour", 1000.0)
    assert start < 990.0
    assert end <= 1000.0


@given(st.floats(1e-3, 1e6), st.floats(0, 1))
def test_an_axis_keeps_within_its_pixels_and_its_ticks_within_its_range(high: float, share: float) -> None:
    for axis in (Axis(0.0, high, 0.0, 500.0), Axis(high / 1e3, high, 0.0, 500.0, log=True)):
        assert -0.01 <= axis.at(axis.low + share * (axis.high - axis.low)) <= 500.01
        ticks = axis.ticks()
        assert 1 <= len(ticks) <= 12
        assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in ticks)


def test_a_scale_is_logarithmic_only_where_the_slowest_would_squeeze_all_others() -> None:
    assert not latency_axis([0.1, 0.2, 0.9], [1.0], 0, 100).log
    assert latency_axis([0.1, 0.1, 40.0], [], 0, 100).log
    assert not latency_axis([], [], 0, 100).log


@pytest.mark.parametrize(
    ("end_s", "first", "last"),
    [(58.0, "0 s", "50 s"), (119.0, "0 s", "105 s"), (1215.0, "0:00", "20:00"), (90_000.0, "0:00", "1440:00")],
)
def test_instants_are_told_in_minutes_where_there_are_some(end_s: float, first: str, last: str) -> None:
    ticks = time_ticks(end_s)
    assert (ticks[0][1], ticks[-1][1]) == (first, last)
    assert len(ticks) <= 12


def test_every_phase_is_named_and_those_not_measured_are_shaded() -> None:
    drawing = timeline(BANDS, [], [], [], [], end_s=100.0)
    assert words(drawing, "phase") == ["warm-up", "steady", "chaos"]
    assert [e.tag.rpartition("}")[2] for e in elements(drawing, "unmeasured")] == ["rect", "text"]


def test_a_phase_shows_its_p95_and_whether_it_is_above_the_objective() -> None:
    drawing = timeline(BANDS, [], [], [], [], end_s=100.0)
    assert words(drawing, "level-label") == ["400 ms", "200 ms"]
    assert [e.text for e in elements(drawing, "level-label") if "bad" in e.attrib["class"]] == ["400 ms"]
    assert len(elements(drawing, "limit")) == 1


def test_events_are_marked_named_and_red_when_they_failed() -> None:
    marks = [Mark("upload", 20.0, 25.0), Mark("kill", 70.0, 70.5, "exit code 1")]
    drawing = timeline(BANDS, marks, [], [], [], end_s=100.0)
    assert words(drawing, "mark-name") == ["upload", "kill"]
    assert ["bad" in e.attrib["class"] for e in elements(drawing, "mark")] == [False, True]
    assert "exit code 1" in drawing


def test_the_names_of_crowded_events_do_not_lie_on_each_other() -> None:
    marks = [Mark(f"upload {i}", 50.0 + i, 50.5 + i) for i in range(40)]
    drawing = timeline(BANDS, marks, [], [], [], end_s=100.0)
    assert len(elements(drawing, "mark")) == 40
    rows: dict[str, list[tuple[float, float]]] = {}
    for name in elements(drawing, "mark-name"):
        x = float(name.attrib["x"])
        rows.setdefault(name.attrib["y"], []).append((x, x + len(name.text or "") * CHARACTER))
    assert rows
    for spans in rows.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(sorted(spans)))
        assert max(end for _, end in spans) <= INSIDE


def test_what_failed_at_one_pixel_is_one_tick_and_counted_in_full() -> None:
    drawing = timeline(BANDS, [], [Rug("refused", "refused", [50.0] * 500 + [80.0])], [], [], end_s=100.0)
    (rug,) = elements(drawing, "rug")
    path, label = rug
    assert path.attrib["d"].count("M") == 2
    assert label.text == "501 refused"


def test_of_very_many_dots_the_slowest_are_all_drawn() -> None:
    points = [(i / 300, 0.1 + (i % 97) / 1000, "a") for i in range(30_000)]
    points += [(50.0 + i, 9.0 + i, "slow") for i in range(5)]
    drawing = timeline(BANDS, [], [], [Dots("good", False, points)], [], end_s=100.0)
    assert MAX_DOTS / 2 < drawing.count("<circle") < MAX_DOTS * 1.2
    assert drawing.count("slow") == 5


def test_cold_answers_have_another_shape() -> None:
    sorts = [Dots("good", False, [(5.0, 0.1, "a")]), Dots("good", True, [(6.0, 0.1, "b"), (7.0, 0.1, "b")])]
    warm, cold = elements(timeline(BANDS, [], [], sorts, [], end_s=100.0), "dots")
    assert [len(group) for group in (warm, cold)] == [1, 2]
    assert warm[0].tag != cold[0].tag


def test_no_line_is_drawn_across_what_was_not_scraped() -> None:
    waiting = Line("waiting", [(float(t), 1.0 + t % 2) for t in range(100) if not 40 < t < 60])
    slots = Line("slots", [(float(t), 2.0) for t in range(100)])
    drawing = timeline(BANDS, [], [], [], [[waiting, slots]], end_s=100.0)
    assert [e.attrib["d"].count("M") for e in elements(drawing, "curve")] == [2, 1]
    assert [e.attrib["class"] for e in elements(drawing, "constant")] == ["curve constant c1"]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=3000))
def test_a_distribution_curve_climbs_from_nothing_to_all(values: list[float]) -> None:
    (curve,) = elements(distribution_curves({"a": values}, None), "curve")
    heights = [float(y) for y in re.findall(r"V([\d.]+)", curve.attrib["d"])]
    assert all(later <= earlier for earlier, later in pairwise(heights))  # pixels count downwards
    assert heights[-1] == pytest.approx(TOP, abs=0.1)


def spread(p95: float) -> Distribution:
    found = describe([p95 * i / 95 for i in range(1, 101)], seed=0)
    assert found is not None
    return found


def test_a_bar_beyond_its_objective_is_red_and_one_of_few_values_pale() -> None:
    drawing = percentile_bars([Bar("slow", spread(2.0), 1.5), Bar("quick", spread(0.5), 1.5, few=True)])
    assert [e.attrib["class"] for e in elements(drawing, "bar")] == ["bar bad", "bar few"]
    wide, narrow = (float(e.attrib["width"]) for e in elements(drawing, "bar"))
    assert wide == pytest.approx(4 * narrow, rel=0.01)
    assert words(drawing, "value")[:4] == ["1.05 s", "2 s", "2.08 s", "100"]
    assert [e.text for e in elements(drawing, "bad") if e.text] == ["2 s"]


def test_a_long_name_is_shortened_in_the_middle_and_told_in_full() -> None:
    name = "customer-support-in-portuguese-of-brazil-v12"
    drawing = percentile_bars([Bar(name, spread(1.0))])
    assert words(drawing, "name") == ["customer-supp…of-brazil-v12"]
    assert f"{name}: P95" in drawing


def test_the_cliff_lies_between_the_sizes_that_it_parts() -> None:
    rows = tuple(
        Row(size, f"set-{size}", 100, Estimate(p95, p95 * 0.9, p95 * 1.1), goodput, goodput)
        for size, p95, goodput in ((2, 0.1, 1.0), (4, 0.12, 1.0), (8, 2.0, 0.2))
    )
    drawing = working_set_curve(WorkingSet("set", "ttft", rows, Cliff(4, 8, "p95")), 0.5)
    sizes = {e.text: float(e.attrib["x"]) for e in elements(drawing, "name") if e.text and e.text.isdigit()}
    (cliff,) = elements(drawing, "cliff")
    left, width = float(cliff.attrib["x"]), float(cliff.attrib["width"])
    assert (left, left + width) == pytest.approx((sizes["4"], sizes["8"]), abs=0.2)
    assert words(drawing, "point") == ["100 ms", "100%", "120 ms", "100%", "2 s", "20%"]
    assert not elements(working_set_curve(WorkingSet("set", "ttft", rows[:2], None), None), "cliff")


def test_a_size_without_an_answer_has_no_point() -> None:
    rows = (Row(2, "set-2", 9, Estimate(0.1, 0.1, 0.1), 1.0, 1.0), Row(4, "set-4", 9, None, 0.0, 0.0))
    drawing = working_set_curve(WorkingSet("set", "ttft", rows, None), None)
    assert words(drawing, "point") == ["100 ms", "100%", "0%"]


def test_more_names_than_colours_share_the_last_one() -> None:
    colours = list(palette([str(i) for i in range(20)]).values())
    assert colours[:8] == [f"c{i}" for i in range(8)]
    assert set(colours[8:]) == {"other"}
