"""The gate: may this version go into production? Pure; the same for command line, API and worker.

A policy is a list of rules for scores, and what is asked of licences, of the sheet that a person reads and of a judging
model. A rule names tasks and a metric, and by how much the adapter has to be better than the base, the prompted base and
the version in production now. A negative margin is how much worse it may be: so a probe for forgetting is the same kind
of rule as the task itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import erfc, sqrt
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import AdapterError, GateRefusedError
from adapters.evaluations import Evaluation, JudgeCalibration, SheetSignature
from adapters.licences import PROMOTION, LicencePolicy, Verdict
from adapters.manifest import EvaluationScore
from adapters.wording import one_line

Rival = Literal["base", "few-shot", "predecessor"]
JUDGED = "judge"  # metrics that a model gave begin with it


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
    significant: bool = Field(
        False, description="Being worse than the margin counts only where the paired test says that it is no chance."
    )
    required: bool = Field(False, description="Refused where nothing was measured that this rule is for.")


class SheetPolicy(BaseModel):
    """What is asked of a person's reading."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    required: bool = Field(False, description="Refused without a sheet that was read and signed.")
    min_marked: int = Field(50, gt=0, description="Answers that have to be marked.")
    max_bad: float = Field(0.1, ge=0, le=1, description="Share of the marked ones that may be bad.")


class JudgePolicy(BaseModel):
    """When the scores of a judging model count: metrics whose name begins with `judge`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_labels: int = Field(50, gt=0, description="Judgements of people to be compared with.")
    min_agreement: float = Field(0.8, ge=0, le=1)
    min_kappa: float = Field(0.6, ge=-1, le=1, description="Cohen's; 0.6 and above is called substantial.")
    max_position_flips: float = Field(0.2, ge=0, le=1)


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
    licence: LicencePolicy = PROMOTION
    sheet: SheetPolicy = SheetPolicy()
    judge: JudgePolicy = JudgePolicy()


@dataclass(frozen=True)
class Evidence:
    """Everything known of a version that the gate may look at.

    scores: of the version itself and of those measured beside it; a later one of the same kind counts.
    """

    scores: tuple[EvaluationScore, ...] = ()
    licences: Verdict | None = None  # None: nothing is known of what it was made from
    sheet: SheetSignature | None = None
    judge: JudgeCalibration | None = None

    def joined(self, evaluations: Iterable[Evaluation]) -> "Evidence":
        """With what was measured later, the oldest first."""
        evidence = self
        for one in evaluations:
            evidence = replace(
                evidence,
                scores=(*evidence.scores, *one.scores),
                sheet=one.sheet or evidence.sheet,
                judge=one.judge or evidence.judge,
            )
        return evidence


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
    evidence: Evidence, policy: PromotionPolicy, *, predecessor: Sequence[EvaluationScore] = ()
) -> Decision:
    """May the version with this evidence go into production?

    predecessor: the scores of the version in production now, used where the candidate has none for it.
    """
    untrusted = judge_faults(evidence.judge, policy.judge)
    scores = [score for score in evidence.scores if not (untrusted and score.metric.startswith(JUDGED))]
    table = _table(predecessor, {"adapter": "predecessor"}) | _table(scores, {})
    reasons: list[str] = []
    passed: list[str] = []
    if len(scores) < len(evidence.scores):
        passed += [f"Scores of the judge do not count: {fault}" for fault in untrusted]
    used: list[Rule] = []
    for (task, metric, subject), score in sorted(table.items()):
        rule = _rule_for(task, metric, policy.rules)
        if subject == "adapter" and rule is not None:
            used.append(rule)
            for holds, sentence in _findings(rule, score, table, policy.noise_sigmas):
                (passed if holds else reasons).append(sentence)
    reasons += [
        f"Nothing was measured of {rule.task} {rule.metric}, which the policy requires."
        for rule in policy.rules
        if rule.required and rule not in used
    ]
    if not used:
        sentence = "No score that the promotion policy has a rule for."
        if policy.unevaluated == "allow":
            passed.append(sentence)
        else:
            reasons.append(sentence + " Evaluate it first: lorikeet eval CONFIG --model NAME@VERSION --attach")
    for holds, sentence in (*_licence_findings(evidence.licences), *_sheet_findings(evidence.sheet, policy.sheet)):
        (passed if holds else reasons).append(sentence)
    return Decision(not reasons, tuple(reasons), tuple(passed))


def judge_faults(calibration: JudgeCalibration | None, policy: JudgePolicy) -> list[str]:
    """Why a judging model may not gate; empty where it may."""
    if calibration is None:
        return ["it was never compared with people: lorikeet eval calibrate"]
    found = []
    if calibration.labels < policy.min_labels:
        found.append(f"compared with people on {calibration.labels} judgements, {policy.min_labels} are needed")
    if calibration.agreement < policy.min_agreement:
        found.append(f"agrees with people in {calibration.agreement:.2f}, {policy.min_agreement:.2f} is needed")
    if calibration.kappa < policy.min_kappa:
        found.append(f"kappa {calibration.kappa:.2f}, {policy.min_kappa:.2f} is needed")
    if calibration.position_flips > policy.max_position_flips:
        found.append(
            f"changes its verdict with the order in {calibration.position_flips:.2f}, "
            f"{policy.max_position_flips:.2f} is allowed"
        )
    return found


def _licence_findings(verdict: Verdict | None) -> Iterable[tuple[bool, str]]:
    """verdict: already by the policy's rules."""
    if verdict is None:
        return
    for finding in verdict.blocking:
        yield False, f"Licence of {finding.source} ({finding.licence}): {finding.what}."
    if not verdict.blocking:
        yield True, f"Licences: {verdict.level}."


def _sheet_findings(sheet: SheetSignature | None, policy: SheetPolicy) -> Iterable[tuple[bool, str]]:
    if sheet is None:
        if policy.required:
            yield False, "No person has read and signed a sheet of its answers: lorikeet eval sheet"
        return
    bad = sheet.bad / sheet.marked if sheet.marked else 0.0
    if policy.required and sheet.marked < policy.min_marked:
        yield False, f"{sheet.signed_by} marked {sheet.marked} answers, {policy.min_marked} are needed."
    sentence = f"{sheet.signed_by} found {sheet.bad} of {sheet.marked} answers bad, {policy.max_bad:.0%} may be."
    yield bad <= policy.max_bad, sentence


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
        yield _against(rule, what, score, other, rival, margin, sigmas)


def _against(
    rule: Rule, what: str, score: EvaluationScore, other: EvaluationScore, rival: Rival, margin: float, sigmas: float
) -> tuple[bool, str]:
    sign = 1.0 if rule.better == "higher" else -1.0
    gain = sign * (score.value - other.value)
    compared = f"{what}: {score.value:.3f} against {other.value:.3f} of {rival}, {gain:+.3f} where"
    if other.p_value is not None:
        chance = other.p_value / 2 >= 0.5 * erfc(sigmas / sqrt(2)) if sigmas else False
        if margin < 0:
            worse = gain < margin - ROUNDING
            excused = worse and rule.significant and chance
            because = f" (paired p = {other.p_value:.2g})" if worse else ""
            return not worse or excused, f"{compared} {margin:+.3f} is needed{because}."
        if gain >= margin - ROUNDING and chance:
            return False, f"{compared} {margin:+.3f} is needed, but it may be chance (paired p = {other.p_value:.2g})."
        return gain >= margin - ROUNDING, f"{compared} {margin:+.3f} is needed."
    noise = sigmas * _standard_error(score, other) if rule.fraction else 0.0
    needed = max(margin, noise) if margin >= 0 else margin
    if margin < 0 and rule.significant:
        needed = min(margin, -noise)
    because = " (less is noise)" if needed != margin else ""
    return gain >= needed - ROUNDING, f"{compared} {needed:+.3f} is needed{because}."


ROUNDING = 1e-9  # 0.98 - 1.0 is a little below -0.02


def _standard_error(one: EvaluationScore, other: EvaluationScore) -> float:
    """Of the difference of two shares, as if measured on different rows: on the same rows it is smaller, so we err
    towards refusing."""

    def variance(score: EvaluationScore) -> float:
        share = min(max(score.value, 0.0), 1.0)
        return share * (1.0 - share) / max(score.rows, 1)

    return sqrt(variance(one) + variance(other))
