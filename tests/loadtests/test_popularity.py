import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.popularity import Uniform, Zipf, pick, shares


def names(count: int) -> list[str]:
    return [f"a{number}" for number in range(count)]


@given(exponent=st.floats(0, 3), count=st.integers(1, 500))
def test_zipf_is_a_power_law_of_the_rank(exponent: float, count: int) -> None:
    found = shares(Zipf(kind="zipf", exponent=exponent), names(count))
    assert found.sum() == pytest.approx(1)
    # log share falls by exactly `exponent` for each unit of log rank; a geometric series would fall with the rank
    np.testing.assert_allclose(np.log(found / found[0]), -exponent * np.log(np.arange(1, count + 1)), atol=1e-9)


@given(count=st.integers(1, 500))
def test_uniform_gives_every_adapter_the_same_share(count: int) -> None:
    np.testing.assert_allclose(shares(Uniform(), names(count)), 1 / count)


@given(draw=st.floats(0, 1, exclude_max=True), count=st.integers(1, 50), exponent=st.floats(0, 5))
def test_every_draw_falls_on_an_adapter(draw: float, count: int, exponent: float) -> None:
    assert 0 <= pick(np.cumsum(shares(Zipf(kind="zipf", exponent=exponent), names(count))), draw) < count


def test_picks_follow_the_shares() -> None:
    wanted = shares(Zipf(kind="zipf", exponent=1.0), names(8))
    cumulative = np.cumsum(wanted)
    picks = [pick(cumulative, draw) for draw in np.random.default_rng(1).random(50_000)]
    np.testing.assert_allclose(np.bincount(picks, minlength=8) / 50_000, wanted, rtol=0.06)
