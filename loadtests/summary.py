"""From the records of a run to its verdict. Pure: the same records always give the same summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.loads import Closed
from loadtests.record import Run
from loadtests.scenario import Scenario
from loadtests.slo import Judgement, Objective, Verdict, judge, parse_objectives, percentiles_for, verdict_of
from loadtests.stats import Distribution, Estimate, Group, error_counts, groups

EXIT_CODES = {Verdict.PASS: 0, Verdict.MISSED: 1, Verdict.UNDECIDED: 3, Verdict.VOID: 4}  # 2 is wrong usage


@dataclass(frozen=True)
class Summary:
    scenario: Scenario
    verdict: Verdict
    reasons: tuple[str, ...]  # why it is not a pass, most telling first
    groups: tuple[Group, ...]  # overall first
    judgements: tuple[Judgement, ...]
    errors: tuple[tuple[str, int], ...]

    @property
    def overall(self) -> Group:
        return self.groups[0]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def of_kind(self, kind: str) -> list[Group]:
        return [group for group in self.groups if group.kind == kind]


def summarise(run: Run) -> Summary:
    scenario = Scenario.model_validate(dict(run.scenario))
    objectives = parse_objectives(scenario.objectives)
    found = groups(run.records, run.windows, seed=scenario.seed, percentiles=percentiles_for(objectives))
    judgements = [j for objective in objectives for j in judge(objective, found, sample_floor=scenario.sample_floor)]
    verdict = verdict_of(judgements, healthy=not run.health.faults, interrupted=run.interrupted)
    measured = {window.name for window in run.windows if window.measured}
    return Summary(
        scenario=scenario,
        verdict=verdict,
        reasons=tuple(_reasons(run, judgements)),
        groups=tuple(found),
        judgements=tuple(judgements),
        errors=tuple(error_counts(record for record in run.records if record.phase in measured)),
    )


def tightest_limit_s(objectives: Sequence[Objective]) -> float | None:
    """The smallest upper limit on a latency that counts from the intended start."""
    limits = [o.limit for o in objectives if o.metric in ("ttft", "e2e") and o.comparison.startswith("<")]
    return min(limits, default=None)


def is_open_loop(scenario: Scenario) -> bool:
    return not any(isinstance(scenario.load_of(phase), Closed) for phase in scenario.phases if phase.measured)


def format_s(seconds: float) -> str:
    """For people: three figures and a fitting unit."""
    if abs(seconds) < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if abs(seconds) < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if abs(seconds) < 1000 else f"{seconds:.0f} s"


def format_figure(objective: Objective, value: float) -> str:
    if objective.metric:
        return format_s(value)
    return f"{value:.2%}" if objective.figure == "success_rate" else f"{value:.3g}/s"


def describe_judgement(judgement: Judgement) -> str:
    where = "" if judgement.group.kind == "overall" else f" ({judgement.group.kind} {judgement.group.name})"
    got = (
        "nothing measured"
        if judgement.measured is None
        else format_figure(judgement.objective, judgement.measured.value)
    )
    note = f" · {judgement.note}" if judgement.note else ""
    return f"{judgement.objective.text}{where}: {got}{note}"


def _reasons(run: Run, judgements: Sequence[Judgement]) -> list[str]:
    interrupted = ["The run was interrupted before its end."] if run.interrupted else []
    if run.health.faults:
        return [f"The load generator could not keep up: {fault}" for fault in run.health.faults] + interrupted
    missed = sorted((j for j in judgements if j.verdict is Verdict.MISSED), key=_excess, reverse=True)
    undecided = [judgement for judgement in judgements if judgement.verdict is Verdict.UNDECIDED]
    return [describe_judgement(judgement) for judgement in (*missed, *undecided)] + interrupted


def _excess(judgement: Judgement) -> float:
    """How far beyond its limit: 2 is twice what is allowed, or half of what is needed."""
    measured, limit = (judgement.measured.value if judgement.measured else 0.0), judgement.objective.limit
    over = judgement.objective.comparison.startswith("<")
    part, whole = (measured, limit) if over else (limit, measured)
    return part / whole if whole else float("inf")


def summary_json(run: Run, summary: Summary) -> dict[str, Any]:
    """What summary.json holds; seconds throughout."""
    return {
        "format": "lorikeet.loadtest.summary",
        "version": 1,
        "verdict": summary.verdict.value,
        "exit_code": summary.exit_code,
        "reasons": list(summary.reasons),
        "objectives": [
            {
                "objective": judgement.objective.text,
                "group": {"kind": judgement.group.kind, "name": judgement.group.name},
                "verdict": judgement.verdict.value,
                "measured": _estimate_json(judgement.measured),
                "limit": judgement.objective.limit,
                "samples": judgement.count,
                "note": judgement.note,
            }
            for judgement in summary.judgements
        ],
        "groups": [_group_json(group) for group in summary.groups],
        "errors": [{"error": error, "count": count} for error, count in summary.errors],
        "health": {
            "healthy": not run.health.faults,
            "faults": list(run.health.faults),
            "send_lag_p99_s": run.health.send_lag_p99_s,
            "loop_lag_p99_s": run.health.loop_lag_p99_s,
            "cpu_share": run.health.cpu_share,
            "offered": run.health.offered,
            "scheduled": run.health.scheduled,
        },
        "open_loop": is_open_loop(summary.scenario),
        "interrupted": run.interrupted,
        "url": run.url,
        "started_at": run.started_at,
        "models": {tenant: list(names) for tenant, names in run.models.items()},
        "environment": dict(run.environment),
        "scenario": dict(run.scenario),
    }


def _estimate_json(estimate: Estimate | None) -> Mapping[str, float] | None:
    return None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _distribution_json(distribution: Distribution) -> dict[str, Any]:
    return {
        "count": distribution.count,
        "mean": distribution.mean,
        "max": distribution.max,
        **{f"p{percent:g}": _estimate_json(value) for percent, value in distribution.percentiles.items()},
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "name": group.name,
        "requests": group.count,
        "outcomes": dict(group.outcomes),
        "success_rate": group.success_rate,
        "answers_per_s": group.per_s,
        "output_tokens_per_s": group.output_tokens_per_s,
        "percentiles_are_lower_bounds": group.is_lower_bound,
        "metrics_s": {name: _distribution_json(distribution) for name, distribution in group.metrics.items()},
        "refusal_s": None if group.refusal is None else _distribution_json(group.refusal),
    }
