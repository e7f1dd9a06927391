"""A run as one HTML file that needs no network: the verdict first, then the picture that explains it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from loadtests import figures
from loadtests.audit import TenantAudit
from loadtests.groups import Group, Limits
from loadtests.loads import describe_load
from loadtests.plots.canvas import format_instant
from loadtests.record import Outcome, Run
from loadtests.recovery import STEADY, Recovery, recoveries
from loadtests.slo import Verdict
from loadtests.stats import Distribution
from loadtests.summary import Summary, format_figure, format_s, is_open_loop

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MEANINGS = {
    "ttft": "intended start to first content",
    "ttft_sent": "the same from the sent instant, as most tools count",
    "tpot": "time per output token after the first",
    "chunk_gap": "between two arrivals of content, all requests pooled",
    "max_gap": "longest stall within each request",
    "e2e": "intended start to last content",
    "e2e_sent": "the same from the sent instant",
    "queue": "waited in the gateway, as it reports",
    "load": "adapter load, as the gateway reports",
    "overhead": "the gateway's own time, as it reports",
    "lag": "sent later than intended (the generator's own delay)",
    "close": "last content to the end of the answer",
}
SENTENCES = {
    Verdict.PASS: "Every objective was met.",
    Verdict.MISSED: "An objective was missed.",
    Verdict.UNDECIDED: "Nothing was missed, but not everything could be decided.",
    Verdict.VOID: "The figures cannot be trusted: the load generator itself was the bottleneck.",
}
WRONG_SENTENCE = "Answers came from the wrong adapter or reached the wrong tenant: no latency makes up for that."
REASONS_SHOWN, WRONG_SHOWN, ERRORS_SHOWN = 6, 10, 20
ROWS_OPEN = 30  # of a table; longer ones are folded


def render_report(run: Run, summary: Summary) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(duration=format_s)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_view(run, summary))


def _view(run: Run, summary: Summary) -> dict[str, Any]:
    return {
        "run": run,
        "summary": summary,
        "verdict": summary.verdict.value,
        "sentence": _sentence(summary),
        "reasons_shown": REASONS_SHOWN,
        "wrong": summary.wrong[:WRONG_SHOWN],
        "tiles": _tiles(summary),
        "over_time": figures.over_time(run, summary),
        "events": [_event_row(recovery, run) for recovery in recoveries(run.events, run.windows, run.records)],
        "steady": STEADY,
        "judgements": _judgement_rows(run, summary),
        "good_means": _good_means(summary),
        "working_sets": [(figures.working_set_figure(found, summary), found.rows) for found in summary.working_sets],
        "main_metric": figures.TITLES[figures.main_metric(summary)],
        "phase_bars": figures.group_bars(summary, "phase"),
        "adapters": figures.adapter_bars(summary),
        "temperature_bars": figures.group_bars(summary, "temperature"),
        "visit_bars": figures.group_bars(summary, "visit"),
        "load_cost": _load_cost(summary),
        "curves": figures.curves(run, summary),
        "tables": _tables(summary),
        "rows_open": ROWS_OPEN,
        "audit": [_audit_row(row) for row in summary.audit.tenants] if summary.audit else [],
        "metric_rows": [
            (name, meaning, _cells(summary.overall.metrics[name]))
            for name, meaning in MEANINGS.items()
            if name in summary.overall.metrics
        ],
        "errors": summary.errors[:ERRORS_SHOWN],
        "health": _health_rows(run, summary),
        "calibration": _calibration_rows(run.calibration) if run.calibration else [],
        "started": _instant(run.started_at),
        "calibrated": _instant(run.calibration["measured_at"]) if run.calibration else "",
        "load": describe_load(summary.scenario.load),
        "loads": _loads(summary),
        "open_loop": is_open_loop(summary.scenario),
        "lower_bound": summary.overall.is_lower_bound,
    }


def _instant(iso: str) -> str:
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _sentence(summary: Summary) -> str:
    if summary.wrong and summary.verdict is Verdict.MISSED:
        return WRONG_SENTENCE
    objectives_met = all(judgement.verdict is not Verdict.MISSED for judgement in summary.judgements)
    if summary.verdict is Verdict.MISSED and objectives_met:
        return "The objectives hold, but a rate limit was not kept to."
    return SENTENCES[summary.verdict]


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Title, figure, note."""
    overall = summary.overall
    tiles = []
    for metric, title in (("ttft", "P95 time to first token"), ("e2e", "P95 end to end")):
        if distribution := overall.metrics.get(metric):
            p95 = distribution.percentiles[95.0]
            tiles.append((title, format_s(p95.value), f"95 % interval {format_s(p95.low)} to {format_s(p95.high)}"))
    ok = overall.outcomes.get(Outcome.OK.value, 0)
    tiles.append(("Success", f"{overall.success_rate:.1%}", f"{ok} of {overall.judged} requests"))
    tiles.append(("Goodput", f"{overall.good_per_s:.3g}/s", f"{overall.goodput:.1%} of the requests were good"))
    cost = summary.cost_of(overall)
    if cost is not None:
        price = f"at {summary.scenario.price_per_hour:g} an hour"
        tiles.append(("Cost of 1000 good requests", f"{cost:.3g}", price))
    if overall.fairness:
        party = min(overall.fairness, key=lambda name: overall.fairness[name].index)
        least = overall.fairness[party]
        tiles.append(("Fairness", f"{least.index:.3f}", f"between {least.parties} {party}s; 1 is even"))
    return tiles


def _judgement_rows(run: Run, summary: Summary) -> list[dict[str, str]]:
    void = bool(run.health.faults)  # a green badge on figures that cannot be trusted would be read as a pass
    order = [Verdict.MISSED, Verdict.UNDECIDED, Verdict.PASS]
    rows = []
    for judgement in sorted(summary.judgements, key=lambda j: order.index(j.verdict)):
        value = judgement.measured
        interval = ""
        if value is not None and value.low != value.high:
            interval = " to ".join(format_figure(judgement.objective, end) for end in (value.low, value.high))
        rows.append(
            {
                "verdict": Verdict.VOID.value if void else judgement.verdict.value,
                "objective": judgement.objective.text,
                "group": "all requests" if judgement.group.kind == "overall" else judgement.group.name,
                "measured": "–" if value is None else format_figure(judgement.objective, value.value),
                "interval": interval,
                "count": str(judgement.count),
                "note": f"else: {judgement.verdict.value}" if void else judgement.note,
            }
        )
    return rows


def _good_means(summary: Summary) -> list[tuple[str, str]]:
    """Phases, and what a good answer keeps to in them."""
    phases: dict[str, list[str]] = {}
    for phase, limits in summary.limits.items():
        phases.setdefault(_describe_limits(limits), []).append(phase)
    if len(phases) == 1:
        return [("", limits) for limits in phases]
    return [(", ".join(names), limits) for limits, names in phases.items()]


def _describe_limits(limits: Limits) -> str:
    return ", ".join(f"{metric} ≤ {format_s(limit)}" for metric, limit in limits.items())


def _event_row(recovery: Recovery, run: Run) -> dict[str, str]:
    mark = recovery.mark
    again = "" if recovery.after_s is None else format_s(recovery.after_s)
    minutes = run.windows[-1].end_s >= 120 if run.windows else False
    return {
        "at": format_instant(mark.start_s, minutes=minutes),
        "phase": recovery.phase,
        "name": mark.name,
        "took": format_s(mark.end_s - mark.start_s),
        "error": mark.error,
        "failed": str(recovery.failed) if recovery.failed else "none",
        "again": again or ("not before the end" if recovery.failed else "nothing failed"),
        "css": "bad" if recovery.failed and not again else "",
    }


def _load_cost(summary: Summary) -> str:
    """What a first visit costs over a second one, in words; empty where no phase touched adapters in turn."""
    metric = figures.main_metric(summary)
    medians = {
        group.name: group.metrics[metric].percentiles[50.0].value
        for group in summary.of_kind("visit")
        if metric in group.metrics
    }
    again_s = medians.pop("again", None)
    if again_s is None or not medians:
        return ""
    told = {"first": "the first time", "after_eviction": "after eviction"}
    costs = [f"{format_s(median - again_s)} {told[name]}" for name, median in medians.items()]
    return f"The median is above that of asking again at once by {' and by '.join(costs)}."


def _loads(summary: Summary) -> list[str]:
    """What else there is to say of the load, and what each phase with one of its own gets."""
    told = [f"{phase.name}: {describe_load(phase.load)}" for phase in summary.scenario.phases if phase.load]
    if turns := summary.scenario.requests.turns:
        told.append(
            f"Conversations of {turns.count} questions: each after the first waits for the answer before, so a slow "
            "server is asked it later (a closed loop within the conversation)"
        )
    return told + [
        f"{phase.name}: on top, from {phase.neighbour.tenant}, {describe_load(phase.neighbour.load)}"
        for phase in summary.scenario.phases
        if phase.neighbour
    ]


def _tables(summary: Summary) -> list[dict[str, Any]]:
    titles = {
        "phase": "By phase",
        "adapter": "By adapter",
        "tenant": "By tenant",
        "temperature": "Warm and cold",
        "visit": "By visit",
    }
    tables = []
    for kind, title in titles.items():
        groups = summary.of_kind(kind)
        if len(groups) > 1:
            groups = [summary.overall, *groups]
        phases = kind == "phase"
        cost = ["cost"] if phases and summary.scenario.price_per_hour else []
        if groups and (phases or len(groups) > 1):
            rows = [_group_row(group, summary) for group in groups]
            tables.append({"title": title, "rows": rows, "extra": [*cost, *(_fairness(groups) if phases else [])]})
    return tables


def _fairness(groups: Sequence[Group]) -> list[str]:
    parties = {party for group in groups for party in group.fairness}
    return [f"between {party}s" for party in ("tenant", "adapter") if party in parties]


def _group_row(group: Group, summary: Summary) -> dict[str, Any]:
    def cell(metric: str, percent: float) -> str:
        return format_s(group.metrics[metric].percentiles[percent].value) if metric in group.metrics else "–"

    cost = summary.cost_of(group)
    return {
        "name": "all requests" if group.kind == "overall" else figures.NAMES.get(group.name, group.name),
        "count": group.count,
        "not_ok": _not_ok(group),
        "success": f"{group.success_rate:.1%}",
        "goodput": f"{group.goodput:.1%}",
        "good_per_s": f"{group.good_per_s:.3g}",
        "cells": [cell(m, p) for m, p in (("ttft", 50.0), ("ttft", 95.0), ("ttft", 99.0), ("e2e", 50.0), ("e2e", 95.0))]
        + [cell("tpot", 50.0)],
        "cost": "–" if cost is None else f"{cost:.3g}",
        **{f"between {party}s": f"{fairness.index:.3f}" for party, fairness in group.fairness.items()},
    }


def _not_ok(group: Group) -> str:
    told = [f"{group.wrong} wrong"] if group.wrong else []
    told += [f"{group.outcomes[o.value]} {name}" for o, name in figures.RUGS.items() if group.outcomes.get(o.value)]
    return ", ".join(told)


def _cells(distribution: Distribution) -> list[str]:
    at = distribution.percentiles
    p95 = at[95.0]
    return [
        *(format_s(at[percent].value) for percent in (50.0, 90.0, 95.0)),
        f"{format_s(p95.low)} to {format_s(p95.high)}",
        format_s(at[99.0].value),
        format_s(distribution.max),
        str(distribution.count),
    ]


def _audit_row(row: TenantAudit) -> dict[str, Any]:
    limit = "none" if row.limit is None else f"{row.limit.requests_per_minute:g} a minute, burst {row.limit.burst}"
    p95 = row.refusal.percentiles[95.0].value if row.refusal else None
    return {
        "tenant": row.tenant,
        "limit": limit,
        "figures": [row.offered, row.admitted, row.allowed, row.refused, row.leaked, row.falsely_refused],
        "told": f"{row.told} of {row.refused}" if row.refused else "–",
        "refusal": "–" if p95 is None else format_s(p95),
        "slack": "–" if row.limit is None else format_s(row.slack_s),
        "faults": "; ".join(row.faults),
    }


def _health_rows(run: Run, summary: Summary) -> list[tuple[str, str, str]]:
    health, limits = run.health, summary.scenario.health
    return [
        (
            "Send lag P99",
            format_s(health.send_lag_p99_s),
            f"≤ {limits.send_lag_p99_ms:g} ms and ≤ {limits.objective_share:.0%} of the tightest objective",
        ),
        ("Event loop lag P99", format_s(health.loop_lag_p99_s), f"≤ {limits.loop_lag_p99_ms:g} ms"),
        ("Share of one core", f"{health.cpu_share:.1%}", f"≤ {limits.cpu_share:.0%}"),
        ("Sent in time", f"{health.offered} of {health.scheduled}", f"≥ {limits.offered_share:.0%}"),
    ]


def _calibration_rows(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each case; calibration.case_json says what it holds."""
    return [
        {
            "name": f"{case['rate_per_s']:g}/s {case['kind']}",
            "requests": case["requests"],
            "errors": [
                (
                    f"{figure['metric']} P{figure['percent']:g}",
                    "–" if figure["error"] is None else f"{figure['error']:+.1%}",
                )
                for figure in case["figures"]
            ],
            "within": case["within_bar"],
        }
        for case in calibration["cases"]
    ]
