"""Which adapter how often. Pure."""

import numpy as np
from numpy.typing import NDArray

from loadtests.scenario import Uniform, Zipf


def shares(popularity: Zipf | Uniform, count: int) -> NDArray[np.float64]:
    """The share of requests of each of `count` adapters, in the order they are listed; sums to 1.

    Zipf is a power law of the rank: share(k) is proportional to k ** -exponent (Zipf 1949), not a geometric series.
    """
    ranks = np.arange(1, count + 1, dtype=np.float64)
    weights = ranks**-popularity.exponent if isinstance(popularity, Zipf) else np.ones(count)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def pick(cumulative: NDArray[np.float64], draw: float) -> int:
    """The index that a uniform draw in [0, 1) falls on, under cumulative shares."""
    return min(int(np.searchsorted(cumulative, draw, side="right")), len(cumulative) - 1)
