import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.shapes import LognormalLengths, UniformLengths, length_at


def test_uniform_lengths_come_equally_often_and_reach_both_ends() -> None:
    lengths = UniformLengths(kind="uniform", low=3, high=7)
    found = [length_at(lengths, draw) for draw in np.random.default_rng(0).random(20_000)]
    counts = np.bincount(found, minlength=9)
    assert counts[:3].sum() == counts[8:].sum() == 0
    np.testing.assert_allclose(counts[3:8] / 20_000, 0.2, atol=0.02)


def test_lognormal_lengths_have_their_median_and_spread() -> None:
    lengths = LognormalLengths(kind="lognormal", median=400, sigma=0.5, high=100_000)
    logs = np.log([length_at(lengths, draw) for draw in np.random.default_rng(0).random(20_000)])
    assert np.exp(np.median(logs)) == pytest.approx(400, rel=0.03)
    assert logs.std() == pytest.approx(0.5, rel=0.03)


@given(draw=st.floats(0, 1, exclude_max=True), median=st.floats(1, 500), sigma=st.floats(0.1, 5))
def test_a_length_is_at_least_one_and_at_most_the_longest(draw: float, median: float, sigma: float) -> None:
    for lengths in (
        LognormalLengths(kind="lognormal", median=median, sigma=sigma, high=500),
        UniformLengths(kind="uniform", low=2, high=500),
    ):
        assert 1 <= length_at(lengths, draw) <= 500


def test_a_number_is_a_length_of_its_own() -> None:
    assert length_at(64, 0.3) == 64
