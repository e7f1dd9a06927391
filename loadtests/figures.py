"""Which of a run's figures go into which plot. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loadtests.groups import Group, is_good, labels_of
from loadtests.panels import panels
from loadtests.plots.bars import Bar, percentile_bars
from loadtests.plots.canvas import COLOURS, palette
from loadtests.plots.curves import distribution_curves
from loadtests.plots.timeline import Band, Dots, Rug, timeline
from loadtests.plots.working_set_curve import working_set_curve
from loadtests.record import METRICS, Outcome, Run
from loadtests.slo import EVERY_PHASE, Objective
from loadtests.summary import Summary, format_s
from loadtests.working_set import WorkingSet

TITLES = {"ttft": "Time to first token", "e2e": "End-to-end time"}
KINDS = {"phase": "by phase", "adapter": "by adapter", "temperature": "warm and cold", "visit": "by visit"}
NAMES = {"after_eviction": "after eviction"}
BAR_ROWS = 24  # groups shown as bars; the tables hold all of them
# Answers in the plot over time, the telling ones last: drawn on top.
UNJUDGED = "unjudged"
SORTS = {UNJUDGED: "not measured", "good": "good", "slow": "beyond a limit", "wrong": "somebody else's"}
RUGS = {
    Outcome.FAILED: "failed",
    Outcome.REFUSED: "refused",
    Outcome.CENSORED: "cut off",
    Outcome.CANCELLED: "given up",
}


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: str
    key: Mapping[str, str]  # name to colour class


def main_metric(summary: Summary) -> str:
    return "ttft" if "ttft" in summary.overall.metrics else "e2e"


def limit_in(summary: Summary, metric: str, phase: str | None) -> float | None:
    """What the metric's P95 must stay below there. phase: None for what holds in all of them."""
    objectives = [judgement.objective for judgement in summary.judgements if _limits_p95(judgement.objective, metric)]
    holding = [objective for objective in objectives if objective.phases == EVERY_PHASE or _holds_in(objective, phase)]
    return min(holding, key=_telling).limit if holding else None


def _limits_p95(objective: Objective, metric: str) -> bool:
    """An objective on the P99 or the maximum does, too; one on the median does not."""
    higher = objective.figure == "max" or (objective.percent or 0) >= 95
    return objective.metric == metric and objective.comparison.startswith("<") and higher


def _holds_in(objective: Objective, phase: str | None) -> bool:
    return phase is not None and fnmatchcase(phase, objective.phases)


def _telling(objective: Objective) -> tuple[bool, float]:
    return objective.percent != 95, objective.limit


def over_time(run: Run, summary: Summary) -> Figure:
    metric = main_metric(summary)
    p95s = {
        group.name: group.metrics[metric].percentiles[95.0].value
        for group in summary.of_kind("phase")
        if metric in group.metrics
    }
    bands = [
        Band(
            window.name,
            window.measured,
            window.start_s,
            window.end_s,
            p95s.get(window.name),
            limit_in(summary, metric, window.name) if window.measured else None,
        )
        for window in run.windows
    ]
    sorts = _answers(run, summary, metric)
    shown, left_out = panels(run.samples)
    note = f" {left_out} more scraped series are in records.jsonl." if left_out else ""
    drawing = timeline(bands, run.events, _rugs(run), sorts, shown, end_s=_end_s(run))
    key = {SORTS[some.css]: some.css for some in sorts if some.css != UNJUDGED}
    key |= {"adapter cold": "cold"} if any(some.cold for some in sorts) else {}
    return Figure(f"{TITLES[metric]} over time", note, drawing, key)


def _answers(run: Run, summary: Summary, metric: str) -> list[Dots]:
    """The ok ones by what they are worth, warm and cold apart."""
    found: dict[tuple[str, bool], list[tuple[float, float, str]]] = {
        (css, cold): [] for css in SORTS for cold in (False, True)
    }
    for record in run.records:
        if record.outcome is Outcome.OK:
            limits = summary.limits.get(record.phase)
            css = UNJUDGED if limits is None else "good" if is_good(record, limits) else "slow"
            some = found["wrong" if record.wrong else css, bool(record.load_s)]
            whose = f"{record.adapter}, {record.tenant}:"
            some.extend((record.intended_s, value, whose) for value in METRICS[metric](record))
    return [Dots(css, cold, points) for (css, cold), points in found.items() if points]


def _rugs(run: Run) -> list[Rug]:
    """Worst first."""
    wrong = Rug("wrong", "wrong", [record.intended_s for record in run.records if record.wrong])
    others = [
        Rug(name, outcome.value, [record.intended_s for record in run.records if record.outcome is outcome])
        for outcome, name in RUGS.items()
    ]
    return [rug for rug in (wrong, *others) if rug.at_s]


def _end_s(run: Run) -> float:
    scraped = run.samples[-1].at_s if run.samples else 0.0
    return max([scraped, *(window.end_s for window in run.windows), *(mark.end_s for mark in run.events)])


@dataclass(frozen=True)
class Parties:
    """Groups to compare, in some of the phases."""

    groups: Sequence[Group]
    phases: str
    limit_s: float | None

    @property
    def where(self) -> str:
        return "" if self.phases == EVERY_PHASE else f" in {self.phases}"


def _adapters(summary: Summary, metric: str) -> Parties:
    """In the phases in which an objective judges each of them, or else in all."""
    each = [j for j in summary.judgements if j.group.kind == "adapter" and _limits_p95(j.objective, metric)]
    if not each:
        return Parties(summary.of_kind("adapter"), EVERY_PHASE, limit_in(summary, metric, None))
    objective = min((judgement.objective for judgement in each), key=_telling)
    return Parties([j.group for j in each if j.objective == objective], objective.phases, objective.limit)


def adapter_bars(summary: Summary) -> Figure:
    """Slowest first."""
    metric = main_metric(summary)
    adapters = _adapters(summary, metric)
    groups = sorted((one for one in adapters.groups if metric in one.metrics), key=lambda one: -_p95(one, metric))
    left_out = len(groups) - BAR_ROWS
    note = f"Slowest first; {left_out} more are in the table." if left_out > 0 else "Slowest first."
    drawing = percentile_bars([_bar(group, summary, metric, adapters.limit_s) for group in groups[:BAR_ROWS]])
    return Figure(f"{TITLES[metric]} by adapter{adapters.where}", note, drawing, {})


def group_bars(summary: Summary, kind: str) -> str:
    """In the order of the summary; empty where there are not two to compare."""
    metric = main_metric(summary)
    groups = [group for group in summary.of_kind(kind) if metric in group.metrics]
    limits_s = [limit_in(summary, metric, group.name if kind == "phase" else None) for group in groups]
    bars = [_bar(group, summary, metric, limit_s) for group, limit_s in zip(groups, limits_s, strict=True)]
    return percentile_bars(bars) if len(bars) > 1 else ""


def _bar(group: Group, summary: Summary, metric: str, limit_s: float | None) -> Bar:
    distribution = group.metrics[metric]
    return Bar(
        NAMES.get(group.name, group.name), distribution, limit_s, few=distribution.count < summary.scenario.sample_floor
    )


def _p95(group: Group, metric: str) -> float:
    return group.metrics[metric].percentiles[95.0].value


def curves(run: Run, summary: Summary) -> list[Figure]:
    """By phase and by adapter; of the time to first token also warm against cold and by visit."""
    kinds = {"ttft": ["phase", "adapter", "temperature", "visit"], "e2e": ["phase", "adapter"]}
    shown = [(metric, kind) for metric in TITLES if metric in summary.overall.metrics for kind in kinds[metric]]
    told = [_curves(run, summary, metric, kind) for metric, kind in shown if len(summary.of_kind(kind)) > 1]
    return told or [_curves(run, summary, main_metric(summary), "phase")]


def _curves(run: Run, summary: Summary, metric: str, kind: str) -> Figure:
    parties = Parties(summary.of_kind(kind), EVERY_PHASE, limit_in(summary, metric, None))
    if kind == "adapter":
        parties = _adapters(summary, metric)
    shown = [group.name for group in parties.groups][:COLOURS]
    measured = {window.name for window in run.windows if window.measured and fnmatchcase(window.name, parties.phases)}
    values: dict[str, list[float]] = {name: [] for name in shown}
    label = labels_of(run.records)[kind]
    for record in run.records:
        if record.outcome is Outcome.OK and record.phase in measured:
            values.get(label(record), []).extend(METRICS[metric](record))
    named = {NAMES.get(name, name): some for name, some in values.items()}
    note = f"The first {COLOURS} of {len(parties.groups)}." if len(parties.groups) > COLOURS else ""
    drawing = distribution_curves(named, parties.limit_s)
    return Figure(f"{TITLES[metric]} {KINDS[kind]}{parties.where}", note, drawing, palette(list(named)))


def working_set_figure(found: WorkingSet, summary: Summary) -> Figure:
    limits_s = {limit_in(summary, found.metric, row.phase) for row in found.rows}
    limit_s = limits_s.pop() if len(limits_s) == 1 else None
    return Figure(f"Working set: {found.name}", describe_cliff(found), working_set_curve(found, limit_s), {})


def describe_cliff(found: WorkingSet) -> str:
    """Where it gives way, in words."""
    sizes = [row.size for row in found.rows]
    if found.cliff is None:
        return f"No cliff: from {sizes[0]} to {sizes[-1]} adapters nothing gave way clearly."
    at = sizes.index(found.cliff.size)
    row, smaller = found.rows[at], found.rows[:at]
    lowest = min((one.p95.value for one in smaller if one.p95), default=None)
    told = []
    if "p95" in found.cliff.why and row.p95 and lowest:
        times = f"{row.p95.value / lowest:.2g} times that of the best smaller size"
        told.append(f"P95 {found.metric} is {format_s(row.p95.value)}, {times}")
    if "goodput" in found.cliff.why:
        highest = max(one.goodput for one in smaller)
        told.append(f"{row.goodput:.0%} of the requests are good instead of {highest:.0%}")
    return f"The cliff: {found.cliff.fits} adapters fit, {row.size} do not. With {row.size}, {', and '.join(told)}."
