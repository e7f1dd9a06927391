from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loadtests.popularity import Geometric, HotSet, RoundRobin, Uniform, Weights, Zipf, pick, shares


def names(count: int) -> list[str]:
    return [f"a{number}" for number in range(count)]


@given(exponent=st.floats(0, 3), count=st.integers(1, 500))
def test_zipf_is_a_power_law_of_the_rank(exponent: float, count: int) -> None:
    found = shares(Zipf(kind="zipf", exponent=exponent), names(count))
    assert found.sum() == pytest.approx(1)
    # log share falls by exactly `exponent` for each unit of log rank; a geometric series would fall with the rank
    np.testing.assert_allclose(np.log(found / found[0]), -exponent * np.log(np.arange(1, count + 1)), atol=1e-9)


@given(ratio=st.floats(0.1, 1), count=st.integers(1, 50))
def test_geometric_falls_by_the_same_ratio_from_rank_to_rank(ratio: float, count: int) -> None:
    found = shares(Geometric(kind="geometric", ratio=ratio), names(count))
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found[1:], ratio * found[:-1])


@given(size=st.integers(1, 20), more=st.integers(1, 30), share=st.floats(0, 1))
def test_a_hot_set_has_its_share_and_divides_it_equally(size: int, more: int, share: float) -> None:
    found = shares(HotSet(kind="hot_set", size=size, share=share), names(size + more))
    np.testing.assert_allclose(found[:size], share / size)
    np.testing.assert_allclose(found[size:], (1 - share) / more)


def test_a_hot_set_of_all_adapters_leaves_no_cold_ones() -> None:
    np.testing.assert_allclose(shares(HotSet(kind="hot_set", size=9, share=0.5), names(4)), 0.25)


@given(count=st.integers(1, 500))
def test_uniform_and_round_robin_give_every_adapter_the_same_share(count: int) -> None:
    for popularity in (Uniform(), RoundRobin(kind="round_robin")):
        np.testing.assert_allclose(shares(popularity, names(count)), 1 / count)


def test_weights_are_shared_out_by_name_and_unnamed_adapters_are_never_asked() -> None:
    popularity = Weights(kind="weights", path=Path("w.csv"))
    found = shares(popularity, ["c", "x", "a"], {Path("w.csv"): {"a": 3.0, "b": 9.0, "c": 1.0}})
    np.testing.assert_allclose(found, [0.25, 0, 0.75])


@example(weights=[0.0, 1.0], draw=0.0)
@example(weights=[1.0, 0.0], draw=1 - 2**-53)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-9, 0.3, 1.0, 7.0]), min_size=1).filter(any),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_every_draw_falls_on_something_with_a_share(weights: list[float], draw: float) -> None:
    assert weights[pick(np.cumsum(weights).tolist(), draw)] > 0


def test_picks_follow_the_shares() -> None:
    wanted = shares(Zipf(kind="zipf", exponent=1.0), names(8))
    cumulative = np.cumsum(wanted).tolist()
    picks = [pick(cumulative, draw) for draw in np.random.default_rng(1).random(50_000)]
    np.testing.assert_allclose(np.bincount(picks, minlength=8) / 50_000, wanted, rtol=0.06)
