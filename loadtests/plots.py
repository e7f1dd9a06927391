"""Plots as inline SVG text: no library, no network, readable in any browser for years. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from loadtests.summary import format_s

WIDTH, HEIGHT = 900, 280
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 18, 36
COLOURS = ("#2463c5", "#d9541e", "#1a8a5a", "#a035b0", "#b8860b", "#0a8fa8", "#c2185b", "#5d6d1e")
MAX_POINTS = 4000  # of a scatter; above it ordinary points are thinned out, the slowest hundredth never
LOG_SPREAD = 30  # a linear axis hides everything ordinary once the slowest is this many times the median


@dataclass(frozen=True)
class Series:
    name: str
    colour: str
    points: Sequence[tuple[float, float]]  # x, y in seconds


@dataclass(frozen=True)
class Band:
    """A stretch of time worth seeing."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Bars:
    name: str
    colour: str
    values: Sequence[tuple[str, float, float, float]]  # label, value, low, high


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

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            ticks = [m * 10.0**power for power in range(first, last + 1) for m in steps]
            return [tick for tick in ticks if self.low <= tick <= self.high * 1.0001]
        step = _step((self.high - self.low) / 5)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def palette(names: Sequence[str]) -> dict[str, str]:
    """Colours for the first few names, grey for the rest."""
    return {name: COLOURS[i] if i < len(COLOURS) else "#8a8f98" for i, name in enumerate(names)}


def latency_over_time(
    series: Sequence[Series], failed_s: Sequence[float], bands: Sequence[Band], *, end_s: float, limit_s: float | None
) -> str:
    """Latency of each request against its intended start; failures as crosses at the top."""
    values = sorted(y for one in series for _, y in one.points)
    y_axis = _value_axis(values, limit_s, HEIGHT - BOTTOM, TOP + 12)
    x_axis = Axis(0.0, max(end_s, 1e-9), LEFT, WIDTH - RIGHT)
    parts = []
    for band in bands:
        x, width = x_axis.at(band.start_s), x_axis.at(band.end_s) - x_axis.at(band.start_s)
        parts.append(f'<rect class="band" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - BOTTOM - TOP}"/>')
        parts.append(f'<text x="{x + 5:.1f}" y="{TOP + 10}" class="note">{escape(band.name)}</text>')
    parts += [_y_grid(y_axis, WIDTH), _x_grid(x_axis, [f"{tick:g} s" for tick in x_axis.ticks()])]
    threshold = values[int(len(values) * 0.99)] if values else 0.0
    stride = max(1, math.ceil(len(values) / MAX_POINTS))
    for one in series:
        circles = "".join(
            f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="2.6">'
            f"<title>{escape(one.name)} · {format_s(y)} at {x:.1f} s</title></circle>"
            for i, (x, y) in enumerate(one.points)
            if i % stride == 0 or y >= threshold
        )
        parts.append(f'<g fill="{one.colour}" fill-opacity="0.72">{circles}</g>')
    for x in failed_s:
        c = x_axis.at(x)
        parts.append(
            f'<path class="cross" d="M{c - 4:.1f},{TOP}l8,8m0,-8l-8,8"><title>failed at {x:.1f} s</title></path>'
        )
    parts.append(_limit_line(y_axis, limit_s))
    return _svg(parts, HEIGHT, "Latency of each request over time")


def distribution_curves(
    series: Sequence[Sequence[float]], names: Sequence[tuple[str, str]], limit_s: float | None
) -> str:
    """Share of answers (up) that came within a time (across). names: name and colour of each series."""
    everything = sorted(value for values in series for value in values)
    x_axis = _value_axis(everything, limit_s, LEFT, WIDTH - RIGHT)
    y_axis = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    parts = [_x_grid(x_axis, [format_s(tick) if tick else "0" for tick in x_axis.ticks()])]
    for share in (0.0, 0.25, 0.5, 0.75, 0.95):
        y = y_axis.at(share)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{share:.0%}</text>')
    for values, (name, colour) in zip(series, names, strict=True):
        ordered = sorted(values)
        steps = [(x_axis.at(value), y_axis.at((i + 1) / len(ordered))) for i, value in enumerate(ordered)]
        if len(steps) > MAX_POINTS // 4:
            keep = len(steps) / (MAX_POINTS // 4)
            steps = [steps[int(i * keep)] for i in range(MAX_POINTS // 4)] + steps[-1:]
        if not steps:
            continue
        path = f"M{steps[0][0]:.1f},{HEIGHT - BOTTOM}" + "".join(f"V{y:.1f}H{x:.1f}" for x, y in _stairs(steps))
        parts.append(f'<path class="curve" stroke="{colour}" d="{path}"><title>{escape(name)}</title></path>')
    if limit_s is not None:
        x = x_axis.at(limit_s)
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_limit_label(x, TOP + 10, limit_s))
    return _svg(parts, HEIGHT, "Share of answers within a time")


def percentile_bars(groups: Sequence[Bars], limit_s: float | None) -> str:
    """One block of horizontal bars per group, with its interval as a whisker; the objective as a line across."""
    row, gap, left = 15, 12, 220
    count = sum(len(group.values) for group in groups)
    height = TOP + BOTTOM + count * row + len(groups) * gap
    values = sorted(high for group in groups for _, _, _, high in group.values)
    # from 0 and linear: the length of a bar is what is read
    axis = Axis(0.0, max([*values, limit_s or 0.0, 1e-6]) * 1.12, left, WIDTH - RIGHT)
    parts = [_x_grid(axis, [format_s(tick) if tick else "0" for tick in axis.ticks()], height)]
    y = float(TOP)
    for group in groups:
        middle = y + len(group.values) * row / 2 + 4
        name = group.name if len(group.name) <= 23 else f"{group.name[:11]}…{group.name[-11:]}"
        label = f'<text class="name" text-anchor="end" x="{left - 44}" y="{middle:.1f}">{escape(name)}'
        parts.append(f"{label}<title>{escape(group.name)}</title></text>")
        for i, (label, value, low, high) in enumerate(group.values):
            over = limit_s is not None and value > limit_s and label == "P95"
            opacity = 0.35 + 0.65 * (i + 1) / len(group.values)
            x, centre = axis.at(value), y + row / 2
            parts.append(
                f'<text class="tick" text-anchor="end" x="{left - 8}" y="{y + row - 4:.1f}">{label}</text>'
                f'<rect x="{left}" y="{y + 1.5:.1f}" width="{x - left:.1f}" height="{row - 3}" fill="{group.colour}"'
                f' fill-opacity="{opacity:.2f}"><title>{escape(group.name)} {label}: {format_s(value)}, interval'
                f" {format_s(low)} to {format_s(high)}</title></rect>"
                f'<line class="whisker" x1="{axis.at(low):.1f}" x2="{axis.at(high):.1f}" y1="{centre}" y2="{centre}"/>'
                f'<text class="value{" bad" if over else ""}" x="{axis.at(max(high, value)) + 6:.1f}"'
                f' y="{y + row - 4:.1f}">{format_s(value)}</text>'
            )
            y += row
        y += gap
    if limit_s is not None:
        x = axis.at(limit_s)
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - BOTTOM}"/>')
        parts.append(_limit_label(x, TOP - 8, limit_s))
    return _svg(parts, height, "Percentiles by adapter")


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each height is held until the next value; the last until its own."""
    xs = [x for x, _ in points[1:]] + [points[-1][0]]
    return [(x, y) for x, (_, y) in zip(xs, points, strict=True)]


def _value_axis(ordered: Sequence[float], limit_s: float | None, start: float, end: float) -> Axis:
    """Linear from 0, unless the slowest values would squeeze all others to the edge."""
    if not ordered:
        return Axis(0.0, (limit_s or 1.0) * 1.1, start, end)
    top = max(ordered[-1], limit_s or 0.0, 1e-6) * 1.06
    median = ordered[len(ordered) // 2]
    if 0 < median * LOG_SPREAD < top:
        return Axis(max(min(ordered[0], limit_s or ordered[0]) * 0.8, 1e-6), top, start, end, log=True)
    return Axis(0.0, top, start, end)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.9999)


def _y_grid(axis: Axis, width: int) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" y1="{axis.at(tick):.1f}" x2="{width - RIGHT}" y2="{axis.at(tick):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{axis.at(tick) + 4:.1f}">'
        f"{format_s(tick) if tick else '0'}</text>"
        for tick in axis.ticks()
    )


def _x_grid(axis: Axis, labels: Sequence[str], height: int = HEIGHT) -> str:
    return "".join(
        f'<line class="grid" x1="{axis.at(tick):.1f}" y1="{TOP}" x2="{axis.at(tick):.1f}" y2="{height - BOTTOM}"/>'
        f'<text class="tick" text-anchor="middle" x="{axis.at(tick):.1f}" y="{height - BOTTOM + 16}">{label}</text>'
        for tick, label in zip(axis.ticks(), labels, strict=True)
    )


def _limit_line(axis: Axis, limit_s: float | None) -> str:
    if limit_s is None:
        return ""
    y = axis.at(limit_s)
    return f'<line class="limit" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>' + _limit_label(
        WIDTH - RIGHT - 4, y - 5, limit_s, "end"
    )


def _limit_label(x: float, y: float, limit_s: float, anchor: str = "") -> str:
    anchor = anchor or ("end" if x > WIDTH * 0.8 else "start")
    shift = 4 if anchor == "start" else -4
    place = f'text-anchor="{anchor}" x="{x + shift:.1f}" y="{y:.1f}"'
    return f'<text class="limit-label" {place}>objective {format_s(limit_s)}</text>'


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
