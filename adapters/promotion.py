"""The gate: may this version go into production, by its scores? Pure; the same for command line, API and worker.

A policy is a list of rules. A rule names tasks and a metric, and by how much the adapter has to be better than the
base, the prompted base and the version in production now. A negative margin is how much worse it may be: so a probe
for forgetting is the same kind of rule as the task itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import AdapterError, GateRefusedError
from adapters.manifest import EvaluationScore
from adapters.wording import one_line

Rival = Literal["base", "few-shot", "predecessor"]


class Rule(BaseModel):
    """What one metric has to show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field("*", description="Tasks it is for; * and ? stand for any text and any character.")
    metric: str = Field("*", description="Metrics it is for, as they are called in the manifest's scores.")
    better: Literal["higher", "lower"] = "higher"
    fraction: bool = Field(True, description="A share of the rows, 0 to 1, so that its noise follows from the rows.")
    limit: float | None = Field(
        None, description="The adapter has to reach this value, or stay below where lower is better."
    )
    margins: Mapping[Rival, float] = Field(
        default_factory=dict,
        description="By how much the adapter has to be better than each; negative: may be worse. Refused without a "
        "score of it to compare with, except that a first version has no predecessor.",
    )
    min_rows: int = Field(1, gt=0, description="Fewer measured rows than this prove nothing.")


class PromotionPolicy(BaseModel):
    """When a version may be promoted. configs/promotion.yaml is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unevaluated: Literal["allow", "refuse"] = Field(
        "refuse", description="Versions without any score that a rule is for, such as adapters made elsewhere."
    )
    noise_sigmas: float = Field(
        1.64, ge=0, description="A gain has to exceed this many standard errors; 1.64 is 95 % on one side."
    )
    rules: tuple[Rule, ...] = Field((), description="The first rule that fits a score judges it.")


@dataclass(frozen=True)
class Decision:
    """reasons: everything that speaks against it. passed: what held, for people who want to know why it may."""

    allowed: bool
    reasons: tuple[str, ...]
    passed: tuple[str, ...] = ()

    def require(self) -> None:
        """Raises GateRefusedError unless it is allowed."""
        if not self.allowed:
            raise GateRefusedError(self.reasons)


def load_policy(path: Path) -> PromotionPolicy:
    """Raises AdapterError naming every field that is wrong."""
    try:
        return PromotionPolicy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except ValidationError as exc:
        raise AdapterError(f"The promotion policy {path} is not valid: {one_line(exc)}") from exc
    except (OSError, yaml.YAMLError) as exc:
        raise AdapterError(f"The promotion policy {path} cannot be read: {one_line(exc)}") from exc


def decide_promotion(
    scores: Sequence[EvaluationScore], policy: PromotionPolicy, *, predecessor: Sequence[EvaluationScore] = ()
) -> Decision:
    """May the version with these scores go into production?

    scores: the candidate's manifest: its own, and those of base, few-shot and maybe predecessor measured beside it.
    predecessor: the scores of the version in production now, used where the candidate's manifest has none for it.
    """
    table = _table(predecessor, {"adapter": "predecessor"}) | _table(scores, {})
    reasons: list[str] = []
    passed: list[str] = []
    judged = False
    for (task, metric, subject), score in sorted(table.items()):
        rule = _rule_for(task, metric, policy.rules)
        if subject == "adapter" and rule is not None:
            judged = True
            for holds, sentence in _findings(rule, score, table, policy.noise_sigmas):
                (passed if holds else reasons).append(sentence)
    if not judged:
        allowed = policy.unevaluated == "allow"
        sentence = "No score that the promotion policy has a rule for."
        return Decision(
            allowed, () if allowed else (sentence + " Evaluate it first: lorikeet eval",), (sentence,) * allowed
        )
    return Decision(not reasons, tuple(reasons), tuple(passed))


_Table = Mapping[tuple[str, str, str], EvaluationScore]  # by task, metric and subject


def _table(
    scores: Iterable[EvaluationScore], renamed: Mapping[str, str]
) -> dict[tuple[str, str, str], EvaluationScore]:
    """renamed: the subjects to take, and what to call them; all as they are when empty."""
    return {
        (score.task, score.metric, renamed.get(score.subject, score.subject)): score
        for score in scores
        if not renamed or score.subject in renamed
    }


def _rule_for(task: str, metric: str, rules: Iterable[Rule]) -> Rule | None:
    fitting = (rule for rule in rules if fnmatchcase(task, rule.task) and fnmatchcase(metric, rule.metric))
    return next(fitting, None)


def _findings(rule: Rule, score: EvaluationScore, table: _Table, sigmas: float) -> Iterable[tuple[bool, str]]:
    """One sentence for each thing the rule asks, and whether it holds."""
    what = f"{score.task} {score.metric}"
    sign = 1.0 if rule.better == "higher" else -1.0
    if score.rows < rule.min_rows:
        yield False, f"{what}: measured on {score.rows} rows, {rule.min_rows} are needed."
    if rule.limit is not None:
        bound = "at least" if rule.better == "higher" else "at most"
        yield sign * (score.value - rule.limit) >= 0, f"{what}: {score.value:.3f}, {bound} {rule.limit:.3f} is needed."
    for rival, margin in sorted(rule.margins.items()):
        other = table.get((score.task, score.metric, rival))
        if other is None:
            if rival != "predecessor":
                yield False, f"{what}: there is no score of {rival} to compare with."
            continue
        gain = sign * (score.value - other.value)
        noise = sigmas * _standard_error(score, other) if rule.fraction else 0.0
        needed = margin if margin < 0 else max(margin, noise)
        because = " (less is noise)" if needed > margin else ""
        sentence = (
            f"{what}: {score.value:.3f} against {other.value:.3f} of {rival}, "
            f"{gain:+.3f} where {needed:+.3f} is needed{because}."
        )
        yield gain >= needed, sentence


def _standard_error(one: EvaluationScore, other: EvaluationScore) -> float:
    """Of the difference of two shares, as if measured on different rows: on the same rows it is smaller, so we err
    towards refusing."""

    def variance(score: EvaluationScore) -> float:
        share = min(max(score.value, 0.0), 1.0)
        return share * (1.0 - share) / max(score.rows, 1)

    return sqrt(variance(one) + variance(other))
