"""What every plot is drawn with: axes, colours, and labels that keep out of each other's way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from loadtests.summary import format_s

WIDTH = 1000
LEFT, RIGHT = 92, 18  # margins of a plot
COLOURS = 8  # classes c0 to c7
LOG_SPREAD = 30  # a linear axis hides everything ordinary once the slowest is this many times the median
CHARACTER = 6.6  # px that a character of a 12 px label takes at most on average
TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)


@dataclass(frozen=True)
class Axis:
    """Data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            ticks = [m * 10.0**power for power in range(first, last + 1) for m in steps]
            return [tick for tick in ticks if self.low <= tick <= self.high * 1.0001]
        step = _round_step((self.high - self.low) / about)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.9999)


def latency_axis(values: Sequence[float], limits_s: Sequence[float], start: float, end: float) -> Axis:
    """From 0 and linear, unless the slowest values would squeeze all others to the edge."""
    ordered = sorted(values)
    top = max([*ordered[-1:], *limits_s, 1e-6]) * 1.06
    median = ordered[len(ordered) // 2] if ordered else 0.0
    if 0 < median * LOG_SPREAD < top:
        return Axis(max(min(ordered[0], *limits_s, top) * 0.8, 1e-6), top, start, end, log=True)
    return Axis(0.0, top, start, end)


def time_ticks(end_s: float, about: int = 10) -> list[tuple[float, str]]:
    """Instants from 0 to end_s with their labels: 40 s, and 1:20 in runs of minutes."""
    step = next((step for step in TIME_STEPS_S if step * about >= end_s), TIME_STEPS_S[-1])
    return [(at, format_instant(at, minutes=end_s >= 120)) for at in range(0, math.floor(end_s) + 1, step)]


def format_instant(at_s: float, *, minutes: bool) -> str:
    whole = round(at_s)
    return f"{whole // 60}:{whole % 60:02d}" if minutes else f"{at_s:.3g} s"


def palette(names: Sequence[str]) -> dict[str, str]:
    """Colour classes for the first few names, one and the same for the rest."""
    return {name: f"c{i}" if i < COLOURS else "other" for i, name in enumerate(names)}


def lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """The row of each span (from, to), so that none overlaps another in its row: the first row with room."""
    ends: list[float] = []
    rows = [0] * len(spans)
    for i, (start, end) in sorted(enumerate(spans), key=lambda item: item[1]):
        row = next((row for row, taken in enumerate(ends) if taken <= start), len(ends))
        if row == len(ends):
            ends.append(end)
        ends[row] = end
        rows[i] = row
    return rows


def label_span(x: float, name: str, limit: float) -> tuple[float, float]:
    """From where to where a label that begins at x reaches; moved left where it would pass the limit."""
    width = len(name) * CHARACTER + 10
    start = max(0.0, min(x, limit - width))
    return start, start + width


def flow(names: Sequence[str], left: float, right: float) -> list[tuple[float, int]]:
    """Where each label of a key stands, one after the other: x and row."""
    places: list[tuple[float, int]] = []
    x, row = left, 0
    for name in names:
        width = len(name) * CHARACTER + 24
        if x + width > right and x > left:
            x, row = left, row + 1
        places.append((x, row))
        x += width
    return places


def shorten(name: str, longest: int) -> str:
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def text(x: float, y: float, content: str, css: str = "tick", anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def format_tick(seconds: float) -> str:
    return format_s(seconds) if seconds else "0"


def y_grid(axis: Axis, right: float, label: Callable[[float], str] = format_tick, about: int = 5) -> str:
    """Lines and labels at the left. right: where the plot ends."""
    return "".join(
        line("grid", LEFT, axis.at(tick), right, axis.at(tick))
        + text(LEFT - 8, axis.at(tick) + 4, label(tick), anchor="end")
        for tick in axis.ticks(about)
    )


def x_grid(ticks: Sequence[tuple[float, str]], top: float, bottom: float) -> str:
    """ticks: pixel and label."""
    return "".join(line("grid", x, top, x, bottom) + text(x, bottom + 16, label, anchor="middle") for x, label in ticks)


def svg(parts: Sequence[str], height: float, title: str, width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
