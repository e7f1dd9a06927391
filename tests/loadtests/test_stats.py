from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.stats import describe, estimate, nearest_rank, rank_of

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=300)


@given(values=VALUES, percent=st.sampled_from(["0.1", "1", "25", "50", "90", "95", "99", "99.9", "100"]))
def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(values: list[float], percent: str) -> None:
    share = Fraction(percent) / 100
    enough = [v for v in values if Fraction(sum(other <= v for other in values), len(values)) >= share]
    assert nearest_rank(np.sort(values), float(percent)) == min(enough)


@given(count=st.integers(1, 10**6), tenths=st.integers(1, 1000))
def test_ranks_are_exact_for_any_number_of_values(count: int, tenths: int) -> None:
    assert rank_of(tenths / 10, count) == max(1, -(-count * tenths // 1000))


@given(values=VALUES, percent=st.sampled_from([50.0, 95.0, 99.0]))
def test_an_interval_consists_of_values_and_is_ordered(values: list[float], percent: float) -> None:
    found = estimate(np.sort(values), percent, np.random.default_rng(0))
    assert {found.value, found.low, found.high} <= set(values)
    assert found.low <= found.high


def test_the_interval_is_the_one_that_resampling_gives() -> None:
    rng = np.random.default_rng(5)
    values = np.sort(rng.lognormal(-2, 0.5, 400))
    resampled = [nearest_rank(np.sort(rng.choice(values, 400)), 95) for _ in range(4000)]
    found = estimate(values, 95, rng)
    positions = np.searchsorted(values, [found.low, found.high, *np.percentile(resampled, [2.5, 97.5])])
    assert abs(positions[0] - positions[2]) <= 1
    assert abs(positions[1] - positions[3]) <= 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    truth = np.exp(0.5 * 1.6448536)  # P95 of lognormal(0, 0.5)
    found = [estimate(np.sort(rng.lognormal(0, 0.5, 500)), 95, rng) for _ in range(300)]
    assert sum(one.low <= truth <= one.high for one in found) / 300 == pytest.approx(0.95, abs=0.05)


def test_nothing_measured_is_no_distribution() -> None:
    assert describe([], 0) is None


@given(
    values=st.lists(st.floats(0, 100), min_size=1, max_size=50),
    cut_off=st.integers(0, 50),
    percent=st.floats(1, 100),
)
def test_cut_off_values_are_ranked_as_if_they_were_infinite(values: list[float], cut_off: int, percent: float) -> None:
    found = describe(values, 0, [percent], cut_off=cut_off)
    assert found is not None
    infinite = describe([*values, *([float("inf")] * cut_off)], 0, [percent])
    assert infinite is not None
    true = infinite.percentiles[percent].value
    assert found.is_lower_bound(percent) == (true == float("inf"))
    assert found.percentiles[percent].value == min(true, max(values))
    assert found.count == len(values)
