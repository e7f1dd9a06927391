"""Percentiles that are values someone really waited, and how sure we are of them. Pure.

Everything is computed from raw values: never from buckets, never by averaging percentiles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
RESAMPLES = 2000  # the ends of a 95 % interval then vary by less than the interval's own rounding to a sample
CONFIDENCE = 0.95


def rank_of(percent: float, count: int) -> int:
    """Nearest rank, from 1: the smallest rank with at least `percent` % of `count` values at or below it."""
    # rounding first: 99.9 / 100 * 1000 is 999.0000000000001 and means 999
    return min(max(math.ceil(round(percent * count / 100, 9)), 1), count)


def nearest_rank(ordered: NDArray[np.float64], percent: float) -> float:
    """ordered: ascending, not empty. Always one of the values."""
    return float(ordered[rank_of(percent, len(ordered)) - 1])


def percentile_of(values: Sequence[float] | NDArray[np.float64], percent: float) -> float:
    """Nearest rank; values: in any order, not empty."""
    return nearest_rank(np.sort(np.asarray(values, dtype=np.float64)), percent)


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval (95 %)."""

    value: float
    low: float
    high: float


def estimate(ordered: NDArray[np.float64], percent: float, rng: np.random.Generator) -> Estimate:
    """Nearest-rank percentile with the percentile bootstrap of Efron (1979), without drawing the resamples.

    A resample of n values picks n uniform positions; its k-th smallest value sits at the k-th smallest position, which
    follows Beta(k, n + 1 - k). Drawing that one position is the same as resampling, in constant time for any n.
    Requests are taken as independent; under a queue they are not, and the true interval is wider.
    """
    count = len(ordered)
    rank = rank_of(percent, count)
    positions = np.ceil(rng.beta(rank, count + 1 - rank, RESAMPLES) * count).astype(np.int64)
    draws = ordered[np.clip(positions, 1, count) - 1]
    tail = (1 - CONFIDENCE) / 2
    draws.sort()
    return Estimate(nearest_rank(ordered, percent), *(nearest_rank(draws, 100 * q) for q in (tail, 1 - tail)))


@dataclass(frozen=True)
class Distribution:
    """Ranks are among the known values and, above them all, those that were cut off: a percentile whose rank falls among
    the latter is at least the largest known one, and so are max and mean where any was cut off.
    """

    count: int  # known values
    mean: float  # of them
    max: float
    percentiles: Mapping[float, Estimate]
    cut_off: int = 0

    def percentile(self, percent: float) -> Estimate | None:
        return self.percentiles.get(percent)

    def is_lower_bound(self, percent: float = 100.0) -> bool:
        return rank_of(percent, self.count + self.cut_off) > self.count


def describe(
    values: Sequence[float] | NDArray[np.float64],
    seed: int,
    percentiles: Sequence[float] = PERCENTILES,
    *,
    cut_off: int = 0,
) -> Distribution | None:
    """cut_off: values not known, other than that they are large. None when there are no known values."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not len(ordered):
        return None
    rng = np.random.default_rng(seed)
    ranked = np.append(ordered, np.full(cut_off, ordered[-1]))
    return Distribution(
        count=len(ordered),
        mean=float(ordered.mean()),
        max=float(ordered[-1]),
        percentiles={percent: estimate(ranked, percent, rng) for percent in percentiles},
        cut_off=cut_off,
    )
