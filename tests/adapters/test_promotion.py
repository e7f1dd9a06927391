"""The promotion gate."""

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterError, GateRefusedError
from adapters.manifest import EvaluationScore
from adapters.promotion import PromotionPolicy, Rule, decide_promotion, load_policy

SHIPPED = Path(__file__).parents[2] / "configs" / "promotion.yaml"
SUBJECTS: tuple[Literal["base", "few-shot", "adapter"], ...] = ("base", "few-shot", "adapter")


def score(
    subject: Any, value: float, *, task: str = "reuters", metric: str = "accuracy", rows: int = 200
) -> EvaluationScore:
    return EvaluationScore(task=task, metric=metric, subject=subject, value=value, rows=rows)


def measured(base: float, few_shot: float, adapter: float, **fields: Any) -> list[EvaluationScore]:
    return [score(subject, value, **fields) for subject, value in zip(SUBJECTS, (base, few_shot, adapter), strict=True)]


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
