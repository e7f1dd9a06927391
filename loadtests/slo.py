"""Objectives: a line such as `p95(ttft) < 400 ms per adapter`, read and judged. Pure.

objective  = figure ("<" | "<=" | ">" | ">=") number [unit] ["per" ("adapter" | "tenant")]
figure     = "p" number "(" metric ")" | "mean(" metric ")" | "max(" metric ")" | "success_rate" | "answers_per_s"
unit       = "us" | "ms" | "s" for metrics, "%" for success_rate
"""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loadtests.errors import ObjectiveError
from loadtests.record import METRICS, Outcome
from loadtests.stats import PERCENTILES, Distribution, Estimate, Group

UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SCOPES = ("adapter", "tenant")
EXAMPLES = "p95(ttft) < 400 ms per adapter, max(e2e) <= 10 s, success_rate > 99 %"
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
    figure: str  # percentile, mean, max, success_rate, answers_per_s
    percent: float | None
    metric: str | None
    comparison: str
    limit: float  # seconds, share, or per second
    scope: str  # overall, adapter, tenant


@dataclass(frozen=True)
class Judgement:
    """One objective on one group."""

    objective: Objective
    group: Group
    measured: Estimate | None
    count: int  # requests the figure rests on
    verdict: Verdict
    note: str = ""


_GRAMMAR = re.compile(
    r"""\s*(?:(?P<figure>p\s*(?P<percent>\d+(?:\.\d+)?)|mean|max)\s*\(\s*(?P<metric>\w+)\s*\)
        |(?P<plain>success_rate|answers_per_s))
        \s*(?P<comparison><=|>=|<|>)\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>us|ms|s|%)?
        (?:\s+per\s+(?P<scope>\w+))?\s*""",
    re.VERBOSE,
)


def parse_objective(text: str) -> Objective:
    """Raises ObjectiveError telling what is not understood."""
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ObjectiveError(f"objective '{text}' is not understood; write one like: {EXAMPLES}")
    metric, unit, limit = match["metric"], match["unit"], float(match["number"])
    if metric and metric not in METRICS:
        raise ObjectiveError(f"objective '{text}': no metric '{metric}'; there are {', '.join(METRICS)}")
    if match["scope"] and match["scope"] not in SCOPES:
        raise ObjectiveError(f"objective '{text}': per {match['scope']}? There is per adapter and per tenant")
    if metric:
        if unit not in UNITS_S:
            raise ObjectiveError(f"objective '{text}': a time needs its unit: us, ms or s")
        limit *= UNITS_S[unit]
    elif match["plain"] == "success_rate":
        limit = limit / 100 if unit == "%" else limit
        if limit > 1 or unit not in (None, "%"):
            raise ObjectiveError(f"objective '{text}': a rate lies between 0 and 1, or between 0 and 100 %")
    elif unit:
        raise ObjectiveError(f"objective '{text}': answers_per_s takes a plain number")
    percent = float(match["percent"]) if match["percent"] else None
    if percent is not None and not 0 < percent <= 100:
        raise ObjectiveError(f"objective '{text}': a percentile lies above 0 and at most at 100")
    figure = match["plain"] or ("percentile" if percent else match["figure"])
    return Objective(text.strip(), figure, percent, metric, match["comparison"], limit, match["scope"] or "overall")


def parse_objectives(texts: Sequence[str]) -> list[Objective]:
    """As written, and one on success where none is."""
    objectives = [parse_objective(text) for text in texts]
    if not any(objective.figure == "success_rate" for objective in objectives):
        objectives.append(parse_objective(DEFAULT_SUCCESS))
    return objectives


def percentiles_for(objectives: Sequence[Objective]) -> list[float]:
    """The usual percentiles and those that objectives ask for."""
    return sorted({*PERCENTILES, *(objective.percent for objective in objectives if objective.percent)})


def judge(objective: Objective, groups: Sequence[Group], *, sample_floor: int) -> list[Judgement]:
    """The objective on each group of its scope."""
    return [_judge(objective, one, sample_floor) for one in groups if one.kind == objective.scope]


def _judge(objective: Objective, one: Group, sample_floor: int) -> Judgement:
    measured, count = _measure(objective, one)

    def judged(verdict: Verdict, note: str = "") -> Judgement:
        return Judgement(objective, one, measured, count, verdict, note)

    if measured is None:
        return judged(Verdict.UNDECIDED, "no answer to measure")
    met = COMPARISONS[objective.comparison](measured.value, objective.limit)
    if count < sample_floor:
        return judged(Verdict.UNDECIDED, f"{count} of {sample_floor} samples needed")
    if met and objective.metric and objective.comparison.startswith("<") and one.is_lower_bound:
        return judged(Verdict.UNDECIDED, f"at least this: {one.share_of(Outcome.CENSORED):.0%} were cut off by the end")
    return judged(Verdict.PASS if met else Verdict.MISSED)


def _measure(objective: Objective, one: Group) -> tuple[Estimate | None, int]:
    if objective.figure == "success_rate":
        return (_exact(one.success_rate) if one.judged else None), one.judged
    if objective.figure == "answers_per_s":
        return _exact(one.per_s), one.count
    distribution: Distribution | None = one.metrics.get(objective.metric or "")
    if distribution is None:
        return None, 0
    if objective.percent is not None:
        return distribution.percentile(objective.percent), distribution.count
    return _exact(distribution.max if objective.figure == "max" else distribution.mean), distribution.count


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value)


def verdict_of(judgements: Sequence[Judgement], *, healthy: bool, interrupted: bool) -> Verdict:
    """Void before all: figures of a generator that could not keep up say nothing. Then the worst judgement counts."""
    verdicts = {judgement.verdict for judgement in judgements}
    if not healthy:
        return Verdict.VOID
    if Verdict.MISSED in verdicts:
        return Verdict.MISSED
    if interrupted or not judgements or Verdict.UNDECIDED in verdicts:
        return Verdict.UNDECIDED
    return Verdict.PASS
