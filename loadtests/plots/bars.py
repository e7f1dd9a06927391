"""Percentiles of groups beside each other, a row each."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from loadtests.plots.canvas import Axis, format_tick, line, shorten, svg, text, x_grid
from loadtests.stats import Distribution
from loadtests.summary import format_s

ROW, TOP, BOTTOM = 24, 24, 26
LEFT, END = 190, 730  # of the bars
COLUMNS = {"P50": 800, "P95": 866, "P99": 932, "values": 990}  # right edges
NAME = 27  # characters that fit beside a bar


@dataclass(frozen=True)
class Bar:
    name: str
    distribution: Distribution  # with P50, P95 and P99
    limit_s: float | None = None  # the objective that holds for it
    few: bool = False  # too few values to judge by


def percentile_bars(bars: Sequence[Bar]) -> str:
    """A bar to each P95, its interval as a thin line, ticks at P50 and P99, and the objective across its row."""
    height = TOP + ROW * len(bars) + BOTTOM
    floor = height - BOTTOM
    # from 0 and linear, as the length of a bar is what is read; only a P99 may lie beyond
    axis = Axis(0.0, max([1e-6, *(value for bar in bars for value in _reach(bar))]) * 1.04, LEFT, END)
    parts = [x_grid([(axis.at(tick), format_tick(tick)) for tick in axis.ticks()], TOP - 4, floor)]
    parts += [text(right, TOP - 8, title, anchor="end") for title, right in COLUMNS.items()]
    parts += [_row(bar, TOP + ROW * i, axis) for i, bar in enumerate(bars)]
    return svg(parts, height, "Percentiles by group")


def _reach(bar: Bar) -> list[float]:
    return [bar.distribution.percentiles[95.0].high, *([] if bar.limit_s is None else [bar.limit_s])]


def _row(bar: Bar, top: float, axis: Axis) -> str:
    p50, p95, p99 = (bar.distribution.percentiles[percent] for percent in (50.0, 95.0, 99.0))
    middle = top + ROW / 2
    over = bar.limit_s is not None and p95.value > bar.limit_s
    css = f"bar{' bad' if over else ''}{' few' if bar.few else ''}"
    title = f"{bar.name}: P95 {format_s(p95.value)}, 95 % interval {format_s(p95.low)} to {format_s(p95.high)}"
    parts = [
        f"<g><title>{escape(title)}</title>",
        text(LEFT - 10, middle + 4, shorten(bar.name, NAME), "name", "end"),
        f'<rect class="{css}" x="{LEFT}" y="{top + 5}" width="{axis.at(p95.value) - LEFT:.1f}" height="{ROW - 10}"/>',
        line("whisker", axis.at(p95.low), middle, axis.at(p95.high), middle),
        line("median", axis.at(p50.value), top + 5, axis.at(p50.value), top + ROW - 5),
    ]
    if p99.value <= axis.high:
        parts.append(line("whisker", axis.at(p99.value), top + 7, axis.at(p99.value), top + ROW - 7))
    if bar.limit_s is not None:
        parts.append(line("limit", axis.at(bar.limit_s), top, axis.at(bar.limit_s), top + ROW))
    figures = (format_s(p50.value), format_s(p95.value), format_s(p99.value), str(bar.distribution.count))
    for (column, right), figure in zip(COLUMNS.items(), figures, strict=True):
        parts.append(text(right, middle + 4, figure, f"value{' bad' if over and column == 'P95' else ''}", "end"))
    return "".join([*parts, "</g>"])
