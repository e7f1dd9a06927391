import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.arrivals import arrivals_s
from loadtests.loads import Constant, Poisson


@given(rate=st.floats(0.1, 500), duration_s=st.floats(0.1, 20), poisson=st.booleans(), seed=st.integers(0, 100))
def test_arrivals_ascend_and_stay_within_the_phase(rate: float, duration_s: float, poisson: bool, seed: int) -> None:
    load = Poisson(rate_per_s=rate) if poisson else Constant(kind="constant", rate_per_s=rate)
    instants = arrivals_s(load, duration_s, np.random.default_rng(seed))
    assert (np.diff(instants) >= 0).all()
    assert ((instants >= 0) & (instants < duration_s)).all()


@given(rate=st.integers(1, 200), duration_s=st.integers(1, 20))
def test_constant_arrivals_have_equal_gaps_and_the_exact_number(rate: int, duration_s: int) -> None:
    instants = arrivals_s(Constant(kind="constant", rate_per_s=rate), duration_s, np.random.default_rng(0))
    assert len(instants) == rate * duration_s
    np.testing.assert_allclose(np.diff(instants), 1 / rate, rtol=1e-6)


def test_poisson_gaps_are_exponential_and_counts_vary_as_much_as_their_mean() -> None:
    instants = arrivals_s(Poisson(rate_per_s=50), 1000, np.random.default_rng(3))
    gaps = np.diff(instants)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.02)  # the coefficient of variation of an exponential
    assert np.median(gaps) == pytest.approx(np.log(2) / 50, rel=0.03)
    counts = np.histogram(instants, bins=1000, range=(0, 1000))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, rel=0.15)
