"""A run as one HTML file that needs no network: the verdict first, then the picture that explains it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from loadtests import plots
from loadtests.groups import Group
from loadtests.loads import describe_load
from loadtests.record import METRICS, Outcome, Record, Run
from loadtests.slo import Verdict
from loadtests.stats import Distribution
from loadtests.summary import Summary, format_figure, format_s, is_open_loop

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_METRICS = ("ttft", "ttft_sent", "tpot", "chunk_gap", "max_gap", "e2e", "e2e_sent", "lag", "queue", "load")
MEANINGS = {
    "ttft": "intended start to first content",
    "ttft_sent": "the same from the sent instant, as most tools count",
    "tpot": "time per output token after the first",
    "chunk_gap": "between two arrivals of content, all requests pooled",
    "max_gap": "longest stall within each request",
    "e2e": "intended start to last content",
    "e2e_sent": "the same from the sent instant",
    "lag": "sent later than intended (the generator's own delay)",
    "queue": "waited in the gateway, as it reports",
    "load": "adapter load, as the gateway reports",
}
SENTENCES = {
    Verdict.PASS: "Every objective was met.",
    Verdict.MISSED: "An objective was missed.",
    Verdict.UNDECIDED: "Nothing was missed, but not everything could be decided.",
    Verdict.VOID: "The figures cannot be trusted: the load generator itself was the bottleneck.",
}
BAR_ROWS = 24  # adapters shown as bars; the tables hold all of them


def render_report(run: Run, summary: Summary) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(duration=format_s)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_view(run, summary))


def _view(run: Run, summary: Summary) -> dict[str, Any]:
    measured = {window.name for window in run.windows if window.measured}
    metric = "ttft" if "ttft" in summary.overall.metrics else "e2e"
    limit_s = _limit_of(summary, metric)
    return {
        "run": run,
        "summary": summary,
        "verdict": summary.verdict.value,
        "sentence": SENTENCES[summary.verdict],
        "tiles": _tiles(summary, run),
        "judgements": _judgement_rows(summary),
        "metric": metric,
        "metric_title": {"ttft": "Time to first token", "e2e": "End-to-end time"}[metric],
        "bars": _bars(summary, metric, limit_s),
        "bars_left_out": max(0, len(summary.of_kind("adapter")) - BAR_ROWS),
        "over_time": _over_time(run, summary, metric, limit_s),
        "curves": [(m, MEANINGS[m], _curves(run, summary, m, measured)) for m in ("ttft", "e2e") if _has(summary, m)],
        "legend": list(plots.palette([group.name for group in summary.of_kind("adapter")]).items())[
            : len(plots.COLOURS)
        ],
        "groups": [_group_row(group) for group in summary.groups],
        "metric_rows": [
            (name, MEANINGS[name], _cells(summary.overall.metrics[name]))
            for name in SHOWN_METRICS
            if name in summary.overall.metrics
        ],
        "errors": summary.errors,
        "health": _health_rows(run, summary),
        "started": run.started_at.replace("T", " ").replace("+00:00", " UTC"),
        "load": describe_load(summary.scenario.load),
        "open_loop": is_open_loop(summary.scenario),
        "lower_bound": summary.overall.is_lower_bound,
        "outcomes": [outcome.value for outcome in Outcome],
    }


def _has(summary: Summary, metric: str) -> bool:
    return metric in summary.overall.metrics


def _limit_of(summary: Summary, metric: str) -> float | None:
    """The P95 objective on the metric, else any upper limit on it: the line drawn in the plots."""
    found = [
        j.objective for j in summary.judgements if j.objective.metric == metric and j.objective.comparison[0] == "<"
    ]
    found.sort(key=lambda objective: (objective.percent != 95, objective.limit))
    return found[0].limit if found else None


def _tiles(summary: Summary, run: Run) -> list[tuple[str, str, str]]:
    overall = summary.overall
    tiles = []
    for metric, title in (
        ("ttft", "P95 time to first token"),
        ("e2e", "P95 end to end"),
        ("tpot", "P95 per output token"),
    ):
        if distribution := overall.metrics.get(metric):
            p95 = distribution.percentiles[95.0]
            tiles.append((title, format_s(p95.value), f"95 % interval {format_s(p95.low)} to {format_s(p95.high)}"))
    ok = overall.outcomes.get(Outcome.OK.value, 0)
    tiles.append(("Success", f"{overall.success_rate:.1%}", f"{ok} of {overall.judged} measured requests"))
    tiles.append(("Answers", f"{overall.per_s:.3g}/s", f"{overall.output_tokens_per_s:.3g} output tokens/s"))
    return tiles


def _judgement_rows(summary: Summary) -> list[dict[str, str]]:
    void = summary.verdict is Verdict.VOID  # a green badge below a void banner would be read as a pass
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


def _bars(summary: Summary, metric: str, limit_s: float | None) -> str:
    adapters = summary.of_kind("adapter")
    colours = plots.palette([group.name for group in adapters])
    return plots.percentile_bars(
        [
            plots.Bars(
                group.name,
                colours[group.name],
                [(f"P{p}", e.value, e.low, e.high) for p in (50, 95, 99) if (e := group.metrics[metric].percentile(p))],
            )
            for group in adapters[:BAR_ROWS]
            if metric in group.metrics
        ],
        limit_s,
    )


def _over_time(run: Run, summary: Summary, metric: str, limit_s: float | None) -> str:
    of = METRICS[metric]
    colours = plots.palette([group.name for group in summary.of_kind("adapter")])
    by_adapter: dict[str, list[tuple[float, float]]] = {}
    for record in run.records:
        if record.outcome is Outcome.OK:
            by_adapter.setdefault(record.adapter, []).extend((record.intended_s, value) for value in of(record))
    bad = [r.intended_s for r in run.records if r.outcome in (Outcome.FAILED, Outcome.REFUSED, Outcome.CENSORED)]
    return plots.latency_over_time(
        [plots.Series(name, colours.get(name, "#8a8f98"), points) for name, points in sorted(by_adapter.items())],
        bad,
        [plots.Band(f"{w.name} (not measured)", w.start_s, w.end_s) for w in run.windows if not w.measured],
        end_s=max((window.end_s for window in run.windows), default=0.0),
        limit_s=limit_s,
    )


def _curves(run: Run, summary: Summary, metric: str, measured: set[str]) -> str:
    names = [group.name for group in summary.of_kind("adapter")][: len(plots.COLOURS)]
    colours = plots.palette(names)
    done = [record for record in run.records if record.outcome is Outcome.OK and record.phase in measured]
    return plots.distribution_curves(
        [_values(done, metric, name) for name in names],
        [(name, colours[name]) for name in names],
        _limit_of(summary, metric),
    )


def _values(records: Sequence[Record], metric: str, adapter: str) -> list[float]:
    return [value for record in records if record.adapter == adapter for value in METRICS[metric](record)]


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


def _group_row(group: Group) -> dict[str, Any]:
    def cell(metric: str, percent: float) -> str:
        return format_s(group.metrics[metric].percentiles[percent].value) if metric in group.metrics else "–"

    return {
        "kind": group.kind,
        "name": "all requests" if group.kind == "overall" else group.name,
        "count": group.count,
        "success": f"{group.success_rate:.1%}",
        "cells": [cell(m, p) for m in ("ttft", "e2e") for p in (50.0, 95.0, 99.0)] + [cell("tpot", 50.0)],
        "outcomes": dict(group.outcomes),
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
