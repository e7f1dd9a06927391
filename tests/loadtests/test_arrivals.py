import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.arrivals import arrivals_s
from loadtests.loads import AnyRate, Constant, Gamma, Poisson, Ramp

rates = st.floats(0.1, 500)
loads = st.one_of(
    st.builds(Poisson, rate_per_s=rates),
    st.builds(Constant, kind=st.just("constant"), rate_per_s=rates),
    st.builds(Gamma, kind=st.just("gamma"), rate_per_s=rates, cv=st.floats(0.05, 5)),
    st.builds(Ramp, kind=st.just("ramp"), from_per_s=st.floats(0, 500), to_per_s=rates),
)


@given(load=loads, duration_s=st.floats(0.1, 20), seed=st.integers(0, 100))
def test_arrivals_ascend_and_stay_within_the_phase(load: AnyRate, duration_s: float, seed: int) -> None:
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


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0])
def test_gamma_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    instants = arrivals_s(Gamma(kind="gamma", rate_per_s=50, cv=cv), 4000, np.random.default_rng(1))
    gaps = np.diff(instants)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)
    # the third moment tells a gamma distribution, whose skewness is 2 CV, from others with the same CV
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 * cv, rel=0.1)


@pytest.mark.parametrize("cv", [0.2, 4.0])
def test_gamma_begins_in_mid_stream_so_that_short_phases_have_their_rate_too(cv: float) -> None:
    load = Gamma(kind="gamma", rate_per_s=20, cv=cv)
    counts = [len(arrivals_s(load, 1.0, np.random.default_rng(seed))) for seed in range(4000)]
    assert np.mean(counts) == pytest.approx(20, rel=0.06)  # beginning with a whole gap sends 27 of CV 4


@pytest.mark.parametrize(("first", "last"), [(0.0, 100.0), (80.0, 20.0), (40.0, 40.0)])
def test_a_ramp_has_the_rate_of_every_moment(first: float, last: float) -> None:
    load = Ramp(kind="ramp", from_per_s=first, to_per_s=last)
    instants = arrivals_s(load, 1000.0, np.random.default_rng(2))
    counts = np.histogram(instants, bins=10, range=(0, 1000))[0]
    wanted = 100 * (first + (last - first) * (np.arange(10) + 0.5) / 10)
    np.testing.assert_allclose(counts, wanted, atol=4 * np.sqrt(wanted).max())  # of a Poisson count
    assert np.abs((counts - wanted) / np.sqrt(wanted)).mean() > 0.2  # and it is drawn, not laid out
