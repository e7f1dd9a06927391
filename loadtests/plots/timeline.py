"""A run on one time axis: phases, events, what went wrong, the latency of each request, and what the server reported."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from loadtests.plots.canvas import (
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    flow,
    label_span,
    lanes,
    latency_axis,
    line,
    palette,
    svg,
    text,
    time_ticks,
    x_grid,
    y_grid,
)
from loadtests.record import Mark
from loadtests.summary import format_s

LANE, RUG_ROW, LATENCY, PANEL, KEY = 15, 14, 250, 64, 18  # px
MARK_LANES = 6  # of event names; one without room there keeps its line, and the table names it
MAX_DOTS = 4000  # above it ordinary ones are thinned out, the slowest hundredth never
GAP = 3.0  # times the usual distance of samples: a line is not drawn across what was not scraped
INSIDE = WIDTH - RIGHT


@dataclass(frozen=True)
class Band:
    """A phase."""

    name: str
    measured: bool
    start_s: float
    end_s: float
    p95_s: float | None = None
    limit_s: float | None = None  # the objective that holds in it


@dataclass(frozen=True)
class Dots:
    """Answers of one sort."""

    css: str
    cold: bool  # their adapter had to be loaded: drawn as diamonds
    points: Sequence[tuple[float, float, str]]  # intended start, latency, whose


@dataclass(frozen=True)
class Rug:
    """Requests that did not end well: a row of marks."""

    name: str
    css: str
    at_s: Sequence[float]


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]  # instant, value; in order


def timeline(
    bands: Sequence[Band],
    marks: Sequence[Mark],
    rugs: Sequence[Rug],
    dots: Sequence[Dots],
    panels: Sequence[Sequence[Line]],
    *,
    end_s: float,
) -> str:
    """panels: each with the lines that share a scale, beneath the latency."""
    x = Axis(0.0, max(end_s, 1e-9), LEFT, INSIDE)
    band_spans = [label_span(x.at(band.start_s), band.name, INSIDE) for band in bands]
    band_lanes = lanes(band_spans)
    mark_spans = [label_span(x.at(mark.start_s), mark.name, INSIDE) for mark in marks]
    mark_lanes = lanes(mark_spans)

    marks_top = LANE * (max(band_lanes, default=-1) + 1) + 4
    rug_top = marks_top + LANE * min(max(mark_lanes, default=-1) + 1, MARK_LANES) + 4
    top = rug_top + RUG_ROW * len(rugs) + 6
    floor = top + LATENCY
    bottom = floor + sum(map(_panel_height, panels))

    parts = [_band_area(band, x, bottom) for band in bands]
    parts.append(x_grid([(x.at(at), label) for at, label in time_ticks(end_s)], top, bottom))
    for band, (start, _), lane in zip(bands, band_spans, band_lanes, strict=True):
        parts.append(line("edge", x.at(band.start_s), lane * LANE, x.at(band.start_s), bottom))
        css = "phase" if band.measured else "phase unmeasured"
        parts.append(text(start + 4, lane * LANE + 11, band.name, css))
    for mark, lane in zip(marks, mark_lanes, strict=True):
        parts.append(_mark(mark, x, marks_top + min(lane, MARK_LANES) * LANE, bottom))
    for mark, (start, _), lane in zip(marks, mark_spans, mark_lanes, strict=True):
        if lane < MARK_LANES:
            css = "mark-name bad" if mark.error else "mark-name"
            parts.append(text(start + 4, marks_top + lane * LANE + 11, mark.name, css))
    for row, rug in enumerate(rugs):
        parts.append(_rug(rug, x, rug_top + row * RUG_ROW))
    y = latency_axis(
        [value for some in dots for _, value, _ in some.points],
        [band.limit_s for band in bands if band.limit_s is not None],
        floor,
        top,
    )
    parts += [y_grid(y, INSIDE), _dots(dots, x, y)]
    if y.log:
        parts.append(text(LEFT - 8, top + 10, "log scale", anchor="end"))
    parts += [_band_levels(band, x, y) for band in bands]
    panel_top: float = floor
    for lines in panels:
        parts.append(_panel(lines, x, panel_top))
        panel_top += _panel_height(lines)
    return svg(parts, bottom + 24, "Latency of each request over time")


def _band_area(band: Band, x: Axis, bottom: float) -> str:
    left, right = x.at(band.start_s), x.at(band.end_s)
    css = "band" if band.measured else "band unmeasured"
    return (
        f'<rect class="{css}" x="{left:.1f}" y="0" width="{max(0.0, right - left):.1f}" height="{bottom:.1f}">'
        f"<title>{escape(band.name)}</title></rect>"
    )


def _band_levels(band: Band, x: Axis, y: Axis) -> str:
    """Its P95 and its objective as lines across it."""
    left, right = x.at(band.start_s), x.at(band.end_s)
    parts = []
    if band.limit_s is not None:
        parts.append(line("limit", left, y.at(band.limit_s), right, y.at(band.limit_s)))
    if band.p95_s is not None:
        at = y.at(band.p95_s)
        missed = " bad" if band.limit_s is not None and band.p95_s > band.limit_s else ""
        parts.append(line(f"level{missed}", left + 1, at, right - 1, at))
        label = format_s(band.p95_s)
        if label_span(left, label, math.inf)[1] <= right:
            parts.append(text((left + right) / 2, at - 5, label, f"level-label{missed}", "middle"))
    return "".join(parts)


def _mark(mark: Mark, x: Axis, top: float, bottom: float) -> str:
    left, width = x.at(mark.start_s), max(0.0, x.at(mark.end_s) - x.at(mark.start_s))
    css = "mark bad" if mark.error else "mark"
    title = f"{mark.name}, {mark.start_s:.1f} to {mark.end_s:.1f} s" + (f": {mark.error}" if mark.error else "")
    area = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"/>'
    return f'<g class="{css}"><title>{escape(title)}</title>{area}{line("", left, top, left, bottom)}</g>'


def _rug(rug: Rug, x: Axis, top: float) -> str:
    """One tick a pixel, however many fell on it."""
    columns = Counter(round(x.at(at)) for at in rug.at_s)
    ticks = "".join(f"M{column},{top + 2:.1f}v{RUG_ROW - 4}" for column in sorted(columns))
    label = text(LEFT - 8, top + RUG_ROW - 3, f"{len(rug.at_s)} {rug.name}", "", "end")
    return f'<g class="rug {rug.css}"><path d="{ticks}"/>{label}</g>'


def _dots(dots: Sequence[Dots], x: Axis, y: Axis) -> str:
    values = sorted(value for some in dots for _, value, _ in some.points)
    threshold = values[int(len(values) * 0.99)] if values else 0.0
    stride = max(1, math.ceil(len(values) / MAX_DOTS))
    parts = []
    for some in dots:
        drawn = [point for i, point in enumerate(some.points) if i % stride == 0 or point[1] >= threshold]
        shapes = "".join(
            _dot(x.at(at), y.at(value), f"{whose} {format_s(value)}", some.cold) for at, value, whose in drawn
        )
        parts.append(f'<g class="dots {some.css}">{shapes}</g>')
    return "".join(parts)


def _dot(x: float, y: float, title: str, cold: bool) -> str:
    title = f"<title>{escape(title)}</title>"
    if cold:
        return f'<path d="M{x:.1f},{y - 4.5:.1f}l4.5,4.5l-4.5,4.5l-4.5,-4.5z">{title}</path>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5">{title}</circle>'


def _panel_height(lines: Sequence[Line]) -> float:
    return KEY * (1 + max((row for _, row in _key(lines)), default=0)) + PANEL


def _key(lines: Sequence[Line]) -> list[tuple[float, int]]:
    return flow([one.name for one in lines], LEFT, INSIDE)


def _panel(lines: Sequence[Line], x: Axis, top: float) -> str:
    values = [value for one in lines for _, value in one.points]
    floor = top + _panel_height(lines)
    y = Axis(min([0.0, *values]), max([*values, 1e-9]) * 1.1, floor, floor - PANEL + 4)
    parts = [y_grid(y, INSIDE, "{:.4g}".format, about=2)]
    for (at, row), one, colour in zip(_key(lines), lines, palette([one.name for one in lines]).values(), strict=True):
        css = "curve constant" if len({value for _, value in one.points}) == 1 else "curve"
        parts.append(
            f'<path class="{css} {colour}" d="{_path(one.points, x, y)}"><title>{escape(one.name)}</title></path>'
        )
        parts.append(f'<rect class="dots {colour}" x="{at:.1f}" y="{top + row * KEY + 6:.1f}" width="10" height="10"/>')
        parts.append(text(at + 14, top + row * KEY + 15, one.name, "key"))
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    distances = sorted(later - earlier for (earlier, _), (later, _) in pairwise(points))
    longest = GAP * distances[len(distances) // 2] if distances else math.inf
    parts, before = [], -math.inf
    for at, value in points:
        parts.append(f"{'M' if at - before > longest else 'L'}{x.at(at):.1f},{y.at(value):.1f}")
        before = at
    return "".join(parts)
