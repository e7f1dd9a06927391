"""P95 and goodput against the number of adapters in use, with the cliff between two sizes shaded."""

from collections.abc import Sequence

from loadtests.plots.canvas import LEFT, RIGHT, WIDTH, Axis, latency_axis, line, svg, text, y_grid
from loadtests.summary import format_s
from loadtests.working_set import Row, WorkingSet

UPPER, LOWER, TOP, BETWEEN, BOTTOM = 170, 90, 34, 36, 42
INSIDE = WIDTH - RIGHT


def working_set_curve(found: WorkingSet, limit_s: float | None) -> str:
    """Sizes at equal distances, as they usually double."""
    rows = found.rows
    middle = TOP + UPPER
    floor = middle + BETWEEN + LOWER
    at = [LEFT + (i + 0.5) * (INSIDE - LEFT) / len(rows) for i in range(len(rows))]
    limits_s = [] if limit_s is None else [limit_s]
    y = latency_axis([row.p95.high for row in rows if row.p95], limits_s, middle, TOP)
    share = Axis(0.0, 1.0, floor, floor - LOWER)
    parts = [_cliff(found, at, floor), y_grid(y, INSIDE, about=4), y_grid(share, INSIDE, "{:.0%}".format, about=2)]
    parts += [text(LEFT, TOP - 18, f"P95 {found.metric}", "name"), text(LEFT, floor - LOWER - 10, "goodput", "name")]
    if limit_s is not None:
        parts.append(line("limit", LEFT, y.at(limit_s), INSIDE, y.at(limit_s)))
        parts.append(text(INSIDE - 2, y.at(limit_s) - 5, f"objective {format_s(limit_s)}", "limit-label", "end"))
    parts.append(_curve([(x, y.at(row.p95.value)) for x, row in zip(at, rows, strict=True) if row.p95], "c0"))
    parts.append(_curve([(x, share.at(row.goodput)) for x, row in zip(at, rows, strict=True)], "c2"))
    for x, row in zip(at, rows, strict=True):
        parts += [_whisker(x, row, y), text(x, share.at(row.goodput) - 9, f"{row.goodput:.0%}", "point", "middle")]
        parts.append(text(x, floor + 17, str(row.size), "name", "middle"))
    parts.append(text((LEFT + INSIDE) / 2, floor + 34, "adapters in use", anchor="middle"))
    return svg(parts, floor + BOTTOM, "P95 and goodput against the number of adapters")


def _cliff(found: WorkingSet, at: Sequence[float], floor: float) -> str:
    if found.cliff is None:
        return ""
    sizes = [row.size for row in found.rows]
    left, right = at[sizes.index(found.cliff.fits)], at[sizes.index(found.cliff.size)]
    area = f'<rect class="cliff" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{floor - TOP}"/>'
    return area + text((left + right) / 2, TOP - 6, "cliff", "limit-label", "middle")


def _whisker(x: float, row: Row, y: Axis) -> str:
    if row.p95 is None:
        return ""
    interval = line("whisker", x, y.at(row.p95.low), x, y.at(row.p95.high))
    return interval + text(x, y.at(row.p95.high) - 9, format_s(row.p95.value), "point", "middle")


def _curve(points: Sequence[tuple[float, float]], css: str) -> str:
    path = "".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(points))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points)
    return f'<path class="curve {css}" d="{path}"/><g class="dots {css}">{dots}</g>'
