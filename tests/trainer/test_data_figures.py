"""Agreement and balance against references and for every input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from trainer.data.agreement import agreement
from trainer.data.balance import distance, general_rows, plan_resampling, shares

LABELS = st.sampled_from("abc")
COUNTS = st.dictionaries(LABELS, st.integers(0, 200), min_size=1)
PRODUCTION = st.dictionaries(LABELS, st.floats(0.05, 1), min_size=1)


@given(
    st.lists(st.tuples(LABELS, LABELS), min_size=2).filter(
        lambda pairs: len({label for pair in pairs for label in pair}) > 1
    )
)
def test_kappa_equals_the_reference(pairs: list[tuple[str, str]]) -> None:
    found = agreement(("one", "other"), {pair: pairs.count(pair) for pair in pairs})
    assert found.kappa == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)), abs=1e-12)
    assert found.raw == sum(one == other for one, other in pairs) / len(pairs)


def test_kappa_of_one_label_throughout_is_undefined() -> None:
    assert agreement(("one", "other"), {("a", "a"): 5}).kappa is None


def test_agreement_needs_a_row() -> None:
    with pytest.raises(ValueError, match="no row"):
        agreement(("one", "other"), {})


@given(COUNTS, PRODUCTION)
def test_distance_is_symmetric_and_a_share(one: dict[str, int], other: dict[str, float]) -> None:
    assert distance(one, other) == pytest.approx(distance(other, one))
    assert -1e-9 <= distance(one, other) <= 1 + 1e-9


@given(
    st.dictionaries(LABELS, st.integers(50, 500), min_size=3), st.dictionaries(LABELS, st.floats(0.1, 1), min_size=3)
)
def test_resampling_comes_within_the_tolerance_and_invents_nothing(
    rows: dict[str, int], production: dict[str, float]
) -> None:
    plan = plan_resampling(rows, production, tolerance=0.1)
    assert all(0 <= plan[name] <= rows[name] for name in rows)
    assert distance(plan, production) <= 0.1 + 0.02  # what rounding to whole rows may add
    if distance(rows, production) > 0.1:
        assert sum(plan.values()) < sum(rows.values())


def test_one_row_of_a_rare_class_does_not_cost_all_the_others() -> None:
    plan = plan_resampling({"a": 1000, "b": 500, "rare": 1}, {"a": 0.6, "b": 0.35, "rare": 0.05}, tolerance=0.1)
    assert sum(plan.values()) > 1000


def test_classes_that_production_has_not_go() -> None:
    assert plan_resampling({"a": 10, "b": 10}, {"a": 1}, tolerance=0.0) == {"a": 10, "b": 0}
    assert plan_resampling({"a": 10}, {"c": 1}, tolerance=0.1) == {"a": 0}


@given(st.integers(1, 10_000), st.floats(0.01, 0.9))
def test_the_mix_has_the_share_that_was_asked_for(own: int, share: float) -> None:
    general = general_rows(own, share)
    assert abs(general / (own + general) - share) <= 1 / (own + general)


@given(COUNTS)
def test_shares_add_up(counts: dict[str, int]) -> None:
    assert sum(shares(counts).values()) == pytest.approx(1 if sum(counts.values()) else 0)
