"""From the records of a run to its verdict. Pure: the same records always give the same summary."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from loadtests.audit import Audit, TenantAudit, audit_limits
from loadtests.errors import RecordError
from loadtests.faults import describe_faults
from loadtests.groups import Columns, Group, Limits, error_counts, groups
from loadtests.loads import Closed
from loadtests.record import Record, Run
from loadtests.recovery import recoveries
from loadtests.scenario import Scenario
from loadtests.slo import (
    EVERY_PHASE,
    SHARES,
    Judgement,
    Objective,
    Verdict,
    goodput_limits,
    judge,
    parse_objectives,
    percentiles_for,
    verdict_of,
)
from loadtests.stats import Distribution, Estimate
from loadtests.working_set import WorkingSet, working_sets

FORMAT = "lorikeet.loadtest.summary"
VERSION = 2
WRONG_SHOWN = 20  # wrong answers listed in summary.json; the records hold all
EXIT_CODES = {Verdict.PASS: 0, Verdict.MISSED: 1, Verdict.UNDECIDED: 3, Verdict.VOID: 4}  # 2 is wrong usage


@dataclass(frozen=True)
class Summary:
    scenario: Scenario
    verdict: Verdict
    reasons: tuple[str, ...]  # why it is not a pass, most telling first
    groups: tuple[Group, ...]  # overall first
    judgements: tuple[Judgement, ...]
    errors: tuple[tuple[str, int], ...]
    wrong: tuple[Record, ...]  # of all phases: answers that were another adapter's or another tenant's
    limits: Mapping[str, Limits]  # of each measured phase, what a good answer keeps to
    working_sets: tuple[WorkingSet, ...]
    audit: Audit | None

    @property
    def overall(self) -> Group:
        return self.groups[0]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def of_kind(self, kind: str) -> list[Group]:
        return [group for group in self.groups if group.kind == kind]

    def cost_of(self, group: Group) -> float | None:
        """Of a thousand good requests, in the currency of price_per_hour; for groups that had the servers alone."""
        price = self.scenario.price_per_hour
        if price is None or not group.good_per_s or group.kind not in ("overall", "phase"):
            return None
        return price / (group.good_per_s * 3600) * 1000


def scenario_of(run: Run) -> Scenario:
    """As kept with its records. Raises RecordError where it is no scenario (any more)."""
    try:
        return Scenario.model_validate(dict(run.scenario))
    except ValidationError as exc:
        faults = "; ".join(describe_faults(None, exc))
        raise RecordError(f"The scenario kept with the run of {run.started_at} cannot be judged: {faults}") from exc


def summarise(run: Run) -> Summary:
    """Raises RecordError when the scenario kept with the run is not understood."""
    scenario = scenario_of(run)
    objectives = parse_objectives(scenario.objectives)
    measured = [window for window in run.windows if window.measured]
    limits = goodput_limits(scenario.goodput, objectives, [window.name for window in measured])
    audited = [phase.name for phase in scenario.phases if phase.audit]
    audit = audit_limits(run.records, audited, scenario.limits, seed=scenario.seed)
    columns = Columns(run.records, limits)
    views = {
        pattern: groups(
            columns,
            [window for window in measured if fnmatchcase(window.name, pattern)],
            seed=scenario.seed,
            percentiles=percentiles_for(objectives),
        )
        for pattern in {EVERY_PHASE, *(objective.phases for objective in objectives)}
    }
    judgements = [
        judgement
        for objective in objectives
        for judgement in judge(objective, views[objective.phases], sample_floor=scenario.sample_floor)
    ]
    wrong = tuple(record for record in run.records if record.wrong)
    verdicts = [
        *(judgement.verdict for judgement in judgements),
        *([audit.verdict] if audit else []),
    ]
    names = {window.name for window in measured}
    return Summary(
        scenario=scenario,
        verdict=verdict_of(verdicts, wrong=bool(wrong), healthy=not run.health.faults, interrupted=run.interrupted),
        reasons=tuple(_reasons(run, judgements, wrong, audit)),
        groups=tuple(views[EVERY_PHASE]),
        judgements=tuple(judgements),
        errors=tuple(error_counts(record for record in run.records if record.phase in names)),
        wrong=wrong,
        limits=limits,
        working_sets=tuple(working_sets(scenario.phases, views[EVERY_PHASE], sample_floor=scenario.sample_floor)),
        audit=audit,
    )


def tightest_limit_s(objectives: Sequence[Objective]) -> float | None:
    """The smallest upper limit on a latency that counts from the intended start."""
    limits = [o.limit for o in objectives if o.metric in ("ttft", "e2e") and o.comparison.startswith("<")]
    return min(limits, default=None)


def is_open_loop(scenario: Scenario) -> bool:
    """Whether every conversation begins at a planned instant; its further questions wait for the answers all the same."""
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
    if objective.figure in SHARES:
        return f"{value:.2%}"
    return f"{value:.3f}" if objective.figure == "fairness" else f"{value:.3g}/s"


def describe_judgement(judgement: Judgement) -> str:
    where = "" if judgement.group.kind == "overall" else f" ({judgement.group.kind} {judgement.group.name})"
    got = (
        "nothing measured"
        if judgement.measured is None
        else format_figure(judgement.objective, judgement.measured.value)
    )
    note = f" · {judgement.note}" if judgement.note else ""
    return f"{judgement.objective.text}{where}: {got}{note}"


def describe_wrong(wrong: Sequence[Record]) -> str:
    one = wrong[0]
    return (
        f"{len(wrong)} of the answers belonged to somebody else, such as that of {one.id} "
        f"(tenant {one.tenant}, adapter {one.adapter}): {one.wrong}"
    )


def _reasons(run: Run, judgements: Sequence[Judgement], wrong: Sequence[Record], audit: Audit | None) -> list[str]:
    first = [describe_wrong(wrong)] if wrong else []
    last = ["The run was interrupted before its end."] if run.interrupted else []
    if run.health.faults:
        return [*first, *(f"The load generator could not keep up: {fault}" for fault in run.health.faults), *last]
    missed = sorted((j for j in judgements if j.verdict is Verdict.MISSED), key=_excess, reverse=True)
    undecided = [judgement for judgement in judgements if judgement.verdict is Verdict.UNDECIDED]
    audited = audit.reasons if audit else []
    leaks, untried = (audited, []) if audit and audit.verdict is Verdict.MISSED else ([], audited)
    return [
        *first,
        *map(describe_judgement, missed),
        *leaks,
        *map(describe_judgement, undecided),
        *untried,
        *last,
    ]


def _excess(judgement: Judgement) -> float:
    """How far beyond its limit: 2 is twice what is allowed, or half of what is needed."""
    measured, limit = (judgement.measured.value if judgement.measured else 0.0), judgement.objective.limit
    over = judgement.objective.comparison.startswith("<")
    part, whole = (measured, limit) if over else (limit, measured)
    return part / whole if whole else float("inf")


def summary_json(run: Run, summary: Summary) -> dict[str, Any]:
    """What summary.json holds; seconds throughout."""
    return {
        "format": FORMAT,
        "version": VERSION,
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
        "wrong": {
            "count": len(summary.wrong),
            "first": [
                {"id": r.id, "tenant": r.tenant, "adapter": r.adapter, "why": r.wrong}
                for r in summary.wrong[:WRONG_SHOWN]
            ],
        },
        "goodput_limits_s": {phase: dict(limits) for phase, limits in summary.limits.items()},
        "groups": [_group_json(group) | {"cost_per_thousand_good": summary.cost_of(group)} for group in summary.groups],
        "working_sets": [_working_set_json(working_set) for working_set in summary.working_sets],
        "audit": None if summary.audit is None else _audit_json(summary.audit),
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
        "calibration": run.calibration,
        "events": [
            asdict(found.mark) | {"phase": found.phase, "failed": found.failed, "ok_again_after_s": found.after_s}
            for found in recoveries(run.events, run.windows, run.records)
        ],
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
        "good": group.good,
        "goodput": group.goodput,
        "good_per_s": group.good_per_s,
        "wrong": group.wrong,
        "fairness": {f"{party}s": asdict(fairness) for party, fairness in group.fairness.items()},
        "percentiles_are_lower_bounds": group.is_lower_bound,
        "metrics_s": {name: _distribution_json(distribution) for name, distribution in group.metrics.items()},
        "refusal_s": None if group.refusal is None else _distribution_json(group.refusal),
    }


def _working_set_json(working_set: WorkingSet) -> dict[str, Any]:
    return {
        "name": working_set.name,
        "metric": working_set.metric,
        "cliff": None if working_set.cliff is None else asdict(working_set.cliff),
        "rows": [asdict(row) for row in working_set.rows],
    }


def _audit_json(audit: Audit) -> dict[str, Any]:
    return {
        "verdict": audit.verdict.value,
        "tenants": [_tenant_audit_json(row) for row in audit.tenants],
    }


def _tenant_audit_json(row: TenantAudit) -> dict[str, Any]:
    return {
        "tenant": row.tenant,
        "limit": None if row.limit is None else row.limit.model_dump(),
        **{name: getattr(row, name) for name in ("offered", "admitted", "refused", "allowed", "leaked")},
        **{name: getattr(row, name) for name in ("falsely_refused", "told", "too_short", "too_long", "slack_s")},
        "refusal_s": None if row.refusal is None else _distribution_json(row.refusal),
        "faults": list(row.faults),
    }
