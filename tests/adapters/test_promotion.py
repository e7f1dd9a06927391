"""The promotion gate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterError, GateRefusedError
from adapters.evaluations import Evaluation, JudgeCalibration, SheetSignature
from adapters.licences import Source, judge_licences
from adapters.manifest import EvaluationScore
from adapters.promotion import (
    Decision,
    Evidence,
    JudgePolicy,
    PromotionPolicy,
    Rule,
    SheetPolicy,
    load_policy,
)
from adapters.promotion import decide_promotion as decide_by_evidence

SHIPPED = Path(__file__).parents[2] / "configs" / "promotion.yaml"
SUBJECTS: tuple[Literal["base", "few-shot", "adapter"], ...] = ("base", "few-shot", "adapter")


def score(
    subject: Any, value: float, *, task: str = "reuters", metric: str = "accuracy", rows: int = 200
) -> EvaluationScore:
    return EvaluationScore(task=task, metric=metric, subject=subject, value=value, rows=rows)


def measured(base: float, few_shot: float, adapter: float, **fields: Any) -> list[EvaluationScore]:
    return [score(subject, value, **fields) for subject, value in zip(SUBJECTS, (base, few_shot, adapter), strict=True)]


def decide_promotion(
    scores: Sequence[EvaluationScore], policy: PromotionPolicy, *, predecessor: Sequence[EvaluationScore] = ()
) -> Decision:
    return decide_by_evidence(Evidence(tuple(scores)), policy, predecessor=predecessor)


def policy(**fields: Any) -> PromotionPolicy:
    return PromotionPolicy(rules=(Rule(**fields),))


def test_an_adapter_that_beats_base_and_few_shot_passes_the_shipped_policy() -> None:
    decision = decide_promotion(measured(0.0, 0.228, 0.789), load_policy(SHIPPED))
    assert decision.allowed
    assert len(decision.passed) == 2
    decision.require()


def test_an_adapter_no_better_than_a_prompt_is_refused_with_the_numbers() -> None:
    decision = decide_promotion(measured(0.1, 0.75, 0.74), load_policy(SHIPPED))
    assert not decision.allowed
    (reason,) = decision.reasons
    assert "reuters accuracy: 0.740 against 0.750 of few-shot, -0.010 where" in reason
    with pytest.raises(GateRefusedError, match="Promotion refused: reuters accuracy"):
        decision.require()


def test_a_gain_within_the_noise_of_few_rows_is_refused_and_of_many_rows_allowed() -> None:
    gate = policy(margins={"few-shot": 0.0}, min_rows=1)
    assert not decide_promotion(measured(0.1, 0.70, 0.75, rows=100), gate).allowed
    assert decide_promotion(measured(0.1, 0.70, 0.75, rows=2000), gate).allowed


def test_few_rows_prove_nothing() -> None:
    decision = decide_promotion(measured(0.0, 0.1, 0.9, rows=20), policy(margins={"base": 0.05}, min_rows=100))
    assert decision.reasons == ("reuters accuracy: measured on 20 rows, 100 are needed.",)


def test_a_missing_comparison_is_refused_but_a_first_version_needs_no_predecessor() -> None:
    decision = decide_promotion(
        [score("adapter", 0.9)], policy(margins={"base": 0.05, "few-shot": 0.0, "predecessor": 0.0})
    )
    assert decision.reasons == (
        "reuters accuracy: there is no score of base to compare with.",
        "reuters accuracy: there is no score of few-shot to compare with.",
    )


def test_a_version_worse_than_the_one_in_production_is_refused() -> None:
    in_production = measured(0.0, 0.2, 0.9)
    decision = decide_promotion(measured(0.0, 0.2, 0.8), load_policy(SHIPPED), predecessor=in_production)
    assert decision.reasons == ("reuters accuracy: 0.800 against 0.900 of predecessor, -0.100 where -0.020 is needed.",)


def test_a_predecessor_measured_beside_the_candidate_counts_more_than_its_own_old_scores() -> None:
    scores = [*measured(0.0, 0.2, 0.8), score("predecessor", 0.79)]
    assert decide_promotion(scores, load_policy(SHIPPED), predecessor=measured(0.0, 0.2, 0.9)).allowed


def test_forgetting_is_judged_by_its_own_rule() -> None:
    task = measured(0.0, 0.2, 0.8)
    kept = [score("base", 0.5, task="forgetting-mmlu"), score("adapter", 0.47, task="forgetting-mmlu")]
    lost = [score("base", 0.5, task="forgetting-mmlu"), score("adapter", 0.25, task="forgetting-mmlu")]
    assert decide_promotion(task + kept, load_policy(SHIPPED)).allowed
    assert not decide_promotion(task + lost, load_policy(SHIPPED)).allowed


def test_lower_can_be_better() -> None:
    gate = policy(metric="perplexity", better="lower", fraction=False, limit=10.0, margins={"base": 1.0})
    good = measured(12.0, 11.0, 8.0, metric="perplexity")
    bad = measured(12.0, 11.0, 11.5, metric="perplexity")
    assert decide_promotion(good, gate).allowed
    assert len(decide_promotion(bad, gate).reasons) == 2


@pytest.mark.parametrize(("unevaluated", "allowed"), [("allow", True), ("refuse", False)])
def test_the_policy_decides_about_adapters_without_scores(unevaluated: Any, allowed: bool) -> None:
    decision = decide_promotion([], PromotionPolicy(unevaluated=unevaluated, rules=(Rule(),)))
    assert decision.allowed is allowed
    assert "No score" in "".join(decision.reasons + decision.passed)


def test_a_rule_that_asks_nothing_of_a_score_counts_as_judged() -> None:
    assert decide_promotion([score("adapter", 0.1)], policy(metric="accuracy")).allowed


VALUE = st.floats(0, 1)


@given(base=VALUE, few_shot=VALUE, adapter=VALUE, better=VALUE)
def test_a_better_adapter_is_never_refused_where_a_worse_one_is_allowed(
    base: float, few_shot: float, adapter: float, better: float
) -> None:
    gate = PromotionPolicy(noise_sigmas=0, rules=(Rule(margins={"base": 0.05, "few-shot": 0.0}, limit=0.1),))
    worse, better = sorted((adapter, better))
    if decide_promotion(measured(base, few_shot, worse), gate).allowed:
        assert decide_promotion(measured(base, few_shot, better), gate).allowed


@given(values=st.lists(VALUE, min_size=3, max_size=3))
def test_a_refusal_has_a_reason_and_an_approval_has_none(values: list[float]) -> None:
    decision = decide_promotion(measured(*values), load_policy(SHIPPED))
    assert decision.allowed == (not decision.reasons)


def test_a_policy_with_unknown_fields_names_them(tmp_path: Path) -> None:
    path = tmp_path / "promotion.yaml"
    path.write_text("rules: [{metric: accuracy, margins: {basis: 0.1}, floor: 1}]")
    with pytest.raises(AdapterError, match=r"rules\.0\.margins\.basis.*rules\.0\.floor"):
        load_policy(path)
    with pytest.raises(AdapterError, match="cannot be read"):
        load_policy(tmp_path / "missing.yaml")


def paired(base: float, adapter: float, p: float, **fields: Any) -> list[EvaluationScore]:
    return [score("adapter", adapter, **fields), score("base", base, **fields).model_copy(update={"p_value": p})]


def test_a_paired_test_decides_instead_of_the_noise_of_unpaired_rows() -> None:
    gate = policy(margins={"base": 0.0})
    assert decide_promotion(paired(0.70, 0.75, 0.02), gate).allowed
    refused = decide_promotion(paired(0.70, 0.75, 0.3), gate)
    assert refused.reasons == (
        "reuters accuracy: 0.750 against 0.700 of base, +0.050 where +0.000 is needed, but it may be chance "
        "(paired p = 0.3).",
    )


def test_what_is_lost_by_chance_is_excused_and_what_is_lost_for_sure_is_not() -> None:
    gate = policy(margins={"base": -0.05}, significant=True)
    assert decide_promotion(paired(0.80, 0.70, 0.2), gate).allowed
    assert not decide_promotion(paired(0.80, 0.70, 0.01), gate).allowed
    assert decide_promotion(paired(0.80, 0.76, 0.01), gate).allowed


def test_a_margin_that_is_just_kept_is_kept() -> None:
    assert decide_promotion(paired(1.0, 0.98, 0.5), policy(margins={"base": -0.02})).allowed


def test_what_the_policy_requires_has_to_be_measured() -> None:
    gate = PromotionPolicy(rules=(Rule(task="forgetting*", required=True), Rule()))
    assert decide_promotion([score("adapter", 0.9)], gate).reasons == (
        "Nothing was measured of forgetting* *, which the policy requires.",
    )
    assert decide_promotion([score("adapter", 0.9), score("adapter", 1.0, task="forgetting-mmlu")], gate).allowed


def calibration(**changes: Any) -> JudgeCalibration:
    fields = {"judge": "gpt", "labels": 100, "agreement": 0.9, "kappa": 0.8, "position_flips": 0.05}
    return JudgeCalibration(rubric_sha256="0" * 64, **{**fields, **changes})


@pytest.mark.parametrize(
    ("judge", "allowed"),
    [
        (None, True),
        (calibration(), False),
        (calibration(labels=10), True),
        (calibration(agreement=0.7), True),
        (calibration(kappa=0.3), True),
        (calibration(position_flips=0.5), True),
    ],
)
def test_a_judge_that_people_do_not_agree_with_does_not_gate(judge: JudgeCalibration | None, allowed: bool) -> None:
    gate = PromotionPolicy(rules=(Rule(limit=0.5),), judge=JudgePolicy())
    scores = (score("adapter", 0.9), score("adapter", 0.1, metric="judge_win_rate"))
    decision = decide_by_evidence(Evidence(scores, judge=judge), gate)
    assert decision.allowed is allowed
    assert any("judge" in sentence for sentence in (*decision.reasons, *decision.passed))


def signature(**changes: Any) -> SheetSignature:
    fields = {"rows": 50, "good": 49, "bad": 1, "signed_by": "ann", "signed_at": 1, "sheet_sha256": "0" * 64}
    return SheetSignature.model_validate({**fields, **changes})


@pytest.mark.parametrize(
    ("sheet", "allowed"),
    [(None, False), (signature(), True), (signature(good=10), False), (signature(good=30, bad=20), False)],
)
def test_a_policy_may_ask_for_a_sheet_that_was_read_and_found_good(sheet: SheetSignature | None, allowed: bool) -> None:
    gate = PromotionPolicy(unevaluated="allow", sheet=SheetPolicy(required=True))
    assert decide_by_evidence(Evidence(sheet=sheet), gate).allowed is allowed


def test_licences_that_block_refuse_whatever_the_scores_say() -> None:
    sources = [
        Source(name="base", kind="base", licence="Apache-2.0"),
        Source(name="rows", kind="data", licence="who knows"),
    ]
    gate = PromotionPolicy(unevaluated="allow")
    refused = decide_by_evidence(Evidence(licences=judge_licences(sources, gate.licence)), gate)
    assert "Licence of rows" in "".join(refused.reasons)
    assert decide_by_evidence(Evidence(licences=judge_licences(sources[:1], gate.licence)), gate).allowed


def test_a_later_evaluation_replaces_the_scores_of_an_earlier_one() -> None:
    first, later = (Evaluation(model="support@1", scores=[score("adapter", value)]) for value in (0.9, 0.2))
    evidence = Evidence((score("adapter", 0.5),)).joined([first, later])
    assert not decide_by_evidence(evidence, policy(limit=0.6)).allowed
    assert decide_by_evidence(Evidence().joined([later, first]), policy(limit=0.6)).allowed
