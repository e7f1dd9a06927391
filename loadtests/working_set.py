"""How many adapters fit: P95 and goodput against the number of adapters in use, and where they give way. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.groups import Group
from loadtests.phases import Phase
from loadtests.stats import Estimate

JUMP = 1.5  # times the best P95 of a smaller size: beyond what a few more adapters in a batch cost
FALL = 0.1  # of all requests that were good with a smaller size, and no longer are
STANDARD_ERRORS = 2.0  # a fall smaller than this many is chance


@dataclass(frozen=True)
class Row:
    """One size of the sweep: a phase of its own."""

    size: int
    phase: str
    judged: int
    p95: Estimate | None  # None: no answer came
    goodput: float
    good_per_s: float
    note: str = ""  # why it is not judged for a cliff


@dataclass(frozen=True)
class Cliff:
    fits: int  # the largest size before it
    size: int
    why: str  # p95, goodput or both


@dataclass(frozen=True)
class WorkingSet:
    name: str  # of the phase that was expanded
    metric: str  # what p95 is of: ttft, or e2e where nothing streams
    rows: tuple[Row, ...]  # by size
    cliff: Cliff | None


def working_sets(phases: Sequence[Phase], groups: Sequence[Group], *, sample_floor: int) -> list[WorkingSet]:
    """Of each phase that was expanded into NAME-SIZE, two sizes at least. sample_floor: requests a size is judged by."""
    measured = {group.name: group for group in groups if group.kind == "phase"}
    sizes: dict[str, list[tuple[int, Group]]] = {}
    for phase in phases:
        size = phase.adapters
        if isinstance(size, int) and phase.name.endswith(f"-{size}") and phase.name in measured:
            sizes.setdefault(phase.name.removesuffix(f"-{size}"), []).append((size, measured[phase.name]))
    return [_working_set(name, some, sample_floor) for name, some in sizes.items() if len(some) > 1]


def _working_set(name: str, sizes: Sequence[tuple[int, Group]], sample_floor: int) -> WorkingSet:
    metric = "ttft" if any("ttft" in group.metrics for _, group in sizes) else "e2e"
    rows = []
    for size, group in sorted(sizes, key=lambda one: one[0]):
        distribution = group.metrics.get(metric)
        p95 = distribution.percentile(95.0) if distribution else None
        note = f"{group.judged} of {sample_floor} samples needed" if group.judged < sample_floor else ""
        rows.append(Row(size, group.name, group.judged, p95, group.goodput, group.good_per_s, note))
    return WorkingSet(name, metric, tuple(rows), find_cliff([row for row in rows if not row.note]))


def find_cliff(rows: Sequence[Row]) -> Cliff | None:
    """The first size, going up, that is clearly worse than the best smaller one. rows: by size.

    P95 jumps: it is at least JUMP times the lowest P95 of the smaller sizes, and the two intervals are apart.
    Goodput falls: its share is at least FALL below the highest of the smaller sizes, and by more than STANDARD_ERRORS
    of the difference. Compared with the best smaller size, not the one before: a decline in many small steps is named
    too, where it has become as bad as one jump.
    """
    for at, row in enumerate(rows[1:], start=1):
        smaller = rows[:at]
        reasons = [name for name, found in (("p95", _jumps(row, smaller)), ("goodput", _falls(row, smaller))) if found]
        if reasons:
            return Cliff(smaller[-1].size, row.size, " and ".join(reasons))
    return None


def _jumps(row: Row, smaller: Sequence[Row]) -> bool:
    best = min((one.p95 for one in smaller if one.p95), key=lambda p95: p95.value, default=None)
    return bool(row.p95 and best and row.p95.value >= JUMP * best.value and row.p95.low > best.high)


def _falls(row: Row, smaller: Sequence[Row]) -> bool:
    best = max(smaller, key=lambda one: one.goodput)
    fall = best.goodput - row.goodput
    error = sum(one.goodput * (1 - one.goodput) / one.judged for one in (best, row) if one.judged) ** 0.5
    return row.judged > 0 and fall >= FALL and fall > STANDARD_ERRORS * error
