"""Distributions as curves: which share of the answers came within a time."""

from collections.abc import Mapping, Sequence
from html import escape

from loadtests.plots.canvas import RIGHT, Axis, format_tick, latency_axis, line, palette, svg, text, x_grid

WIDTH, HEIGHT, LEFT = 490, 250, 52  # two beside each other
TOP, BOTTOM = 18, 30
MAX_STEPS = 1000  # of a curve; more are finer than a pixel
SHARES = (0.0, 0.25, 0.5, 0.75, 0.95)


def distribution_curves(series: Mapping[str, Sequence[float]], limit_s: float | None) -> str:
    """Share of answers (up) that came within a time (across), a curve per name; further left is better."""
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    limits_s = [] if limit_s is None else [limit_s]
    x = latency_axis([value for values in series.values() for value in values], limits_s, LEFT, right)
    y = Axis(0.0, 1.0, floor, TOP)
    parts = [x_grid([(x.at(tick), format_tick(tick)) for tick in x.ticks(4)], TOP, floor)]
    for share in SHARES:
        parts.append(line("grid", LEFT, y.at(share), right, y.at(share)))
        parts.append(text(LEFT - 8, y.at(share) + 4, f"{share:.0%}", anchor="end"))
    colours = palette(list(series))
    for name, values in series.items():
        if values:
            path = _stairs(sorted(values), x, y)
            parts.append(f'<path class="curve {colours[name]}" d="{path}"><title>{escape(name)}</title></path>')
    if limit_s is not None:
        at = x.at(limit_s)
        left = at > WIDTH * 0.6
        parts.append(line("limit", at, TOP, at, floor))
        label = f"objective {format_tick(limit_s)}"
        parts.append(text(at - 4 if left else at + 4, TOP - 5, label, "limit-label", "end" if left else "start"))
    return svg(parts, HEIGHT, "Share of answers within a time", WIDTH)


def _stairs(ordered: Sequence[float], x: Axis, y: Axis) -> str:
    """At each value the share of values at or below it; between two values the share of the lower one."""
    stride = max(1, len(ordered) // MAX_STEPS)
    chosen = [*range(0, len(ordered) - 1, stride), len(ordered) - 1]
    path = f"M{x.at(ordered[chosen[0]]):.1f},{y.at(0.0):.1f}"
    return path + "".join(f"H{x.at(ordered[i]):.1f}V{y.at((i + 1) / len(ordered)):.1f}" for i in chosen)
