"""Objectives: a line such as `p95(ttft) < 400 ms per adapter in steady`, read and judged. Pure.

objective  = figure ("<" | "<=" | ">" | ">=") number [unit] ["per" ("adapter" | "tenant" | "phase")] ["in" phases]
figure     = "p" number "(" metric ")" | "mean(" metric ")" | "max(" metric ")" | "success_rate" | "answers_per_s"
           | "goodput" | "good_per_s" | "fairness" ["(" ("tenants" | "adapters") ")"]
unit       = "us" | "ms" | "s" for metrics, "%" for success_rate and goodput
phases     = a phase's name, or a pattern such as churn-*; all measured phases where nothing is said

goodput    = share of the requests that were answered well: complete, right, and within the limits of goodput_limits()
fairness   = Jain's index over what each tenant (or adapter) got of what it asked for, see groups.jain
"""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from loadtests.errors import ObjectiveError
from loadtests.groups import Group, Limits
from loadtests.record import METRICS, Outcome
from loadtests.stats import PERCENTILES, Distribution, Estimate

UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SCOPES = ("adapter", "tenant", "phase")
EVERY_PHASE = "*"
SHARES = ("success_rate", "goodput")  # figures that may be given in percent
NOTICED = ("ttft", "ttft_sent", "tpot", "max_gap", "e2e", "e2e_sent")  # metrics a caller notices, one value a request
NEARLY_ALL = 95.0  # a percentile from here on says of each answer what it must keep; a median or mean does not
EXAMPLES = "p95(ttft) < 400 ms per adapter, max(e2e) <= 10 s in steady, success_rate > 99 %, fairness > 0.9"
# Percentiles are taken over answers that came, so an objective on latency alone would be met by failing fast.
DEFAULT_SUCCESS = "success_rate > 99 %"


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105
    MISSED = "missed"
    UNDECIDED = "undecided"
    VOID = "void"


@dataclass(frozen=True)
class Objective:
    text: str
    figure: str  # percentile, mean, max, success_rate, answers_per_s, goodput, good_per_s, fairness
    percent: float | None
    metric: str | None
    comparison: str
    limit: float  # seconds, share, per second, or index
    scope: str  # overall, adapter, tenant, phase
    phases: str = EVERY_PHASE  # pattern of the phases it is judged in
    between: str = "tenant"  # of fairness: between tenants or adapters


@dataclass(frozen=True)
class Judgement:
    """One objective on one group."""

    objective: Objective
    group: Group
    measured: Estimate | None
    count: int  # requests the figure rests on
    verdict: Verdict
    note: str = ""


_NUMBER = r"\d+(?:\.\d+)?"
_GRAMMAR = re.compile(
    rf"""\s*(?:(?P<figure>p\s*(?P<percent>{_NUMBER})|mean|max)\s*\(\s*(?P<metric>\w+)\s*\)
        |(?P<plain>success_rate|answers_per_s|goodput|good_per_s|fairness)
         (?:\s*\(\s*(?P<between>tenant|adapter)s\s*\))?)
        \s*(?P<comparison><=|>=|<|>)\s*(?P<number>{_NUMBER})\s*(?P<unit>us|ms|s|%)?
        (?:\s+per\s+(?P<scope>\w+))?(?:\s+in\s+(?P<phases>[\w*?\[\]!-]+))?\s*""",
    re.VERBOSE,
)
_TIME = re.compile(rf"\s*({_NUMBER})\s*(us|ms|s)\s*")


def parse_time_s(text: str) -> float:
    """`400 ms` in seconds. Raises ObjectiveError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ObjectiveError(f"'{text}' is no time; write a number with its unit, such as 400 ms or 2 s")
    return float(match[1]) * UNITS_S[match[2]]


def parse_objective(text: str) -> Objective:
    """Raises ObjectiveError telling what is not understood."""
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ObjectiveError(f"objective '{text}' is not understood; write one like: {EXAMPLES}")
    metric, plain, unit, scope = match["metric"], match["plain"], match["unit"], match["scope"]
    if metric and metric not in METRICS:
        raise ObjectiveError(f"objective '{text}': no metric '{metric}'; there are {', '.join(METRICS)}")
    if scope and scope not in SCOPES:
        raise ObjectiveError(f"objective '{text}': per {scope}? There is per adapter, per tenant and per phase")
    if plain == "fairness" and scope not in (None, "phase"):
        raise ObjectiveError(f"objective '{text}': fairness compares, so it has no value of one {scope}; leave it out")
    if match["between"] and plain != "fairness":
        raise ObjectiveError(f"objective '{text}': only fairness is between tenants or adapters")
    percent = float(match["percent"]) if match["percent"] else None
    if percent is not None and not 0 < percent <= 100:
        raise ObjectiveError(f"objective '{text}': a percentile lies above 0 and at most at 100")
    return Objective(
        text=text.strip(),
        figure=plain or ("percentile" if percent else match["figure"]),
        percent=percent,
        metric=metric,
        comparison=match["comparison"],
        limit=_limit(text, metric, plain, float(match["number"]), unit),
        scope=scope or "overall",
        phases=match["phases"] or EVERY_PHASE,
        between=match["between"] or "tenant",
    )


def _limit(text: str, metric: str | None, plain: str | None, number: float, unit: str | None) -> float:
    if metric:
        if unit not in UNITS_S:
            raise ObjectiveError(f"objective '{text}': a time needs its unit: us, ms or s")
        return number * UNITS_S[unit]
    if plain in SHARES:
        share = number / 100 if unit == "%" else number
        if share > 1 or unit not in (None, "%"):
            raise ObjectiveError(f"objective '{text}': a rate lies between 0 and 1, or between 0 and 100 %")
        return share
    if unit:
        raise ObjectiveError(f"objective '{text}': {plain} takes a plain number")
    if plain == "fairness" and number > 1:
        raise ObjectiveError(f"objective '{text}': fairness lies between 0 and 1")
    return number


def parse_objectives(texts: Sequence[str]) -> list[Objective]:
    """As written, and objectives on success where none is.

    One over all where there is none at all, and one like each upper limit on a latency (per adapter in steady, say)
    whose phases no written one covers.
    """
    objectives = [parse_objective(text) for text in texts]
    written = [objective for objective in objectives if objective.figure == "success_rate"]
    wanted = [] if written else [("overall", EVERY_PHASE)]
    for latency in objectives:
        covered = any(latency.phases == one.phases or fnmatchcase(latency.phases, one.phases) for one in written)
        if _is_upper_limit(latency) and not covered:
            wanted.append((latency.scope, latency.phases))
    for scope, phases in dict.fromkeys(wanted):
        per = "" if scope == "overall" else f" per {scope}"
        where = "" if phases == EVERY_PHASE else f" in {phases}"
        objectives.append(parse_objective(DEFAULT_SUCCESS + per + where))
    return objectives


def _is_of_nearly_all(objective: Objective) -> bool:
    return objective.figure == "max" or (objective.percent or 0.0) >= NEARLY_ALL


def _is_upper_limit(objective: Objective) -> bool:
    """On a latency."""
    return objective.metric is not None and objective.comparison.startswith("<")


def percentiles_for(objectives: Sequence[Objective]) -> list[float]:
    """The usual percentiles and those that objectives ask for."""
    return sorted({*PERCENTILES, *(objective.percent for objective in objectives if objective.percent)})


def goodput_limits(
    given: Mapping[str, str], objectives: Sequence[Objective], phases: Sequence[str]
) -> dict[str, Limits]:
    """Of each phase, what an answer must keep to be good.

    given: the scenario's own limits, such as {"ttft": "400 ms"}, then the same in every phase. Without: of each metric
    a caller notices the widest upper limit that an objective sets to nearly all answers of that phase (P95 and above, or
    max): p50 < 100 ms does not mean that every second answer is bad. Raises ObjectiveError.
    """
    if given:
        everywhere = {metric: parse_time_s(text) for metric, text in given.items()}
        return {phase: everywhere for phase in phases}  # noqa: C420  the values are read only
    upper = [o for o in objectives if o.metric in NOTICED and _is_upper_limit(o) and _is_of_nearly_all(o)]
    limits: dict[str, Limits] = {}
    for phase in phases:
        widest: dict[str, float] = {}
        for objective in upper:
            if objective.metric and fnmatchcase(phase, objective.phases):
                widest[objective.metric] = max(objective.limit, widest.get(objective.metric, 0.0))
        limits[phase] = widest
    return limits


def judge(objective: Objective, groups: Sequence[Group], *, sample_floor: int) -> list[Judgement]:
    """The objective on each group of its scope. groups: of its phases, the overall group first.

    An objective that finds no group is undecided: nothing measured is no pass.
    """
    found = [_judge(objective, one, sample_floor) for one in groups if one.kind == objective.scope]
    return found or [Judgement(objective, groups[0], None, 0, Verdict.UNDECIDED, f"no {objective.scope} was measured")]


def _judge(objective: Objective, one: Group, sample_floor: int) -> Judgement:
    measured, count = _measure(objective, one)

    def judged(verdict: Verdict, note: str = "") -> Judgement:
        return Judgement(objective, one, measured, count, verdict, note)

    if measured is None:
        nothing = f"no good answers of two {objective.between}s to compare"
        return judged(Verdict.UNDECIDED, nothing if objective.figure == "fairness" else "no answer to measure")
    met = COMPARISONS[objective.comparison](measured.value, objective.limit)
    if count < sample_floor:
        return judged(Verdict.UNDECIDED, f"{count} of {sample_floor} samples needed")
    # a figure that may be larger can neither keep an upper limit nor miss a lower one
    if met == objective.comparison.startswith("<") and _is_lower_bound(objective, one):
        return judged(Verdict.UNDECIDED, f"at least this: {one.outcomes[Outcome.CENSORED]} were cut off by the end")
    return judged(Verdict.PASS if met else Verdict.MISSED)


def _measure(objective: Objective, one: Group) -> tuple[Estimate | None, int]:
    match objective.figure:
        case "success_rate":
            return (_exact(one.success_rate) if one.judged else None), one.judged
        case "goodput":
            return (_exact(one.goodput) if one.judged else None), one.judged
        case "answers_per_s":
            return _exact(one.per_s), one.count
        case "good_per_s":
            return _exact(one.good_per_s), one.count
        case "fairness":
            fairness = one.fairness.get(objective.between)
            return (_exact(fairness.index), fairness.fewest) if fairness else (None, 0)
    distribution: Distribution | None = one.metrics.get(objective.metric or "")
    if distribution is None:
        return None, 0
    if objective.percent is not None:
        return distribution.percentile(objective.percent), distribution.count
    return _exact(distribution.max if objective.figure == "max" else distribution.mean), distribution.count


def _is_lower_bound(objective: Objective, one: Group) -> bool:
    distribution = one.metrics.get(objective.metric or "")
    return distribution is not None and distribution.is_lower_bound(objective.percent or 100.0)


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value)


def verdict_of(judgements: Sequence[Verdict], *, wrong: bool, healthy: bool, interrupted: bool) -> Verdict:
    """A wrong answer fails the run however it was measured. Else void comes first: figures of a generator that could not
    keep up say nothing. Then the worst judgement counts.
    """
    if wrong:
        return Verdict.MISSED
    if not healthy:
        return Verdict.VOID
    if Verdict.MISSED in judgements:
        return Verdict.MISSED
    if interrupted or not judgements or Verdict.UNDECIDED in judgements:
        return Verdict.UNDECIDED
    return Verdict.PASS
