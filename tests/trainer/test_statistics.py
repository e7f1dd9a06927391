"""Intervals and paired tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation.statistics import Measured, difference, estimate, mean_of


def test_a_share_has_wilsons_interval_and_is_never_certain() -> None:
    found = estimate(mean_of([True] * 70 + [False] * 30))
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.6042, 0.7811), abs=1e-4)
    everything = estimate(mean_of([True] * 100))
    assert everything.high == 1.0
    assert everything.low == pytest.approx(0.963, abs=1e-3)


def test_a_mean_has_the_interval_that_theory_gives() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    found = estimate(mean_of(values.tolist()))
    margin = 1.96 * values.std() / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - margin, abs=0.002)
    assert found.high == pytest.approx(values.mean() + margin, abs=0.002)


def test_the_same_rows_and_seed_give_the_same_interval() -> None:
    one = mean_of([0.1, 0.5, 0.9, 0.3])
    assert estimate(one, seed=3) == estimate(one, seed=3)


def test_right_and_wrong_are_tested_by_mcnemar_and_the_rest_by_resampling() -> None:
    first, second = [True] * 50 + [False] * 50, [True] * 60 + [False] * 40
    exact = difference(mean_of(first), mean_of(second))
    assert exact.test == "McNemar"
    assert exact.value == pytest.approx(0.1)
    assert exact.p == pytest.approx(2 * 0.5**10)
    drawn = difference(mean_of([0.2, 0.4] * 40), mean_of([0.3, 0.5] * 40))
    assert drawn.test == "paired bootstrap"
    assert drawn.p < 0.01
    assert drawn.low == pytest.approx(drawn.value) == pytest.approx(drawn.high)


def test_a_model_is_no_better_than_itself() -> None:
    values = mean_of([0.1, 0.9, 0.4, 0.6])
    same = difference(values, values)
    assert (same.value, same.p) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=20)
def test_an_interval_holds_its_value_and_a_p_is_a_probability(first: list[float], second: list[float]) -> None:
    rows = min(len(first), len(second))
    one, other = mean_of(first[:rows]), mean_of(second[:rows])
    found = estimate(one)
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    between = difference(one, other)
    assert 0 < between.p <= 1
    assert between.p == pytest.approx(difference(other, one).p, abs=0.02)


def test_a_part_without_anything_below_it_does_not_count() -> None:
    above, below = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 0.0], [2.0, 0.0]])
    assert float(Measured(above, below).value()) == 0.5
    assert float(Measured(np.zeros((2, 1)), np.zeros((2, 1)), empty=1.0).value()) == 1.0
