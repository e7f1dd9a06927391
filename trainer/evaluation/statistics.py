"""How sure a figure is: intervals by resampling rows, and paired tests between two models on the same rows. Pure.

Every metric here is a sum over rows divided by another, averaged over its parts (one for accuracy, one per label for
macro F1), so that one resampling serves all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
BATCH = 100  # resamples at once: rows × batch × parts floats in memory

Rows = NDArray[np.float64]  # [rows, parts]


@dataclass(frozen=True)
class Measured:
    """A metric's parts, row by row. Its value is the mean over parts of sum(above) / sum(below)."""

    above: Rows
    below: Rows
    empty: float = 0.0  # the value where no part has anything below

    @property
    def is_share(self) -> bool:
        """Right or wrong, row by row."""
        single = self.above.shape[1] == 1 and bool(np.all(self.below == 1))
        return single and bool(np.all((self.above == 0) | (self.above == 1)))

    def value(self, rows: NDArray[np.intp] | None = None) -> NDArray[np.float64]:
        """rows: [..., count] indices to take; the result has the leading shape."""
        above, below = (part if rows is None else part[rows] for part in (self.above, self.below))
        total, of = above.sum(axis=-2), below.sum(axis=-2)
        counted = of > 0
        parts = np.divide(total, of, out=np.zeros_like(total), where=counted)
        many = counted.sum(axis=-1)
        mean = np.divide(parts.sum(axis=-1), many, out=np.full(many.shape, self.empty), where=many > 0)
        return np.asarray(mean, dtype=np.float64)


def mean_of(values: Sequence[float] | Sequence[bool]) -> Measured:
    above = np.asarray(values, dtype=np.float64)[:, None]
    return Measured(above, np.ones_like(above))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One model less the other, on the same rows. p: two-sided."""

    value: float
    low: float
    high: float
    p: float
    test: str


def estimate(measured: Measured, *, seed: int = 0) -> Estimate:
    """Shares by Wilson's interval, which is honest at 0 and 100 % too; everything else by percentile bootstrap."""
    value = float(measured.value())
    rows = len(measured.above)
    if measured.is_share:
        from scipy.stats import binomtest

        found = binomtest(int(measured.above.sum()), rows).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(value, float(found.low), float(found.high))
    if rows < 2:
        return Estimate(value, value, value)
    low, high = _bootstrap(measured.value, rows, seed)
    return Estimate(value, low, high)


def difference(first: Measured, second: Measured, *, seed: int = 0) -> Difference:
    """second less first: McNemar's exact test where rows are right or wrong, otherwise a paired bootstrap."""
    rows = len(first.above)

    def statistic(chosen: NDArray[np.intp] | None) -> NDArray[np.float64]:
        return np.asarray(second.value(chosen) - first.value(chosen))

    value = float(statistic(None))
    low, high, p = (value, value, 1.0) if rows < 2 else _paired(statistic, rows, seed)
    if first.is_share and second.is_share:
        p = mcnemar(list(first.above[:, 0] > 0), list(second.above[:, 0] > 0))
        return Difference(value, low, high, p, "McNemar")
    return Difference(value, low, high, p, "paired bootstrap")


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p that two models, right or wrong on the same rows, are equally good (McNemar 1947, binomial form)."""
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue)


def _bootstrap(statistic: Any, rows: int, seed: int) -> tuple[float, float]:
    low, high, _ = _resample(statistic, rows, seed)
    return low, high


def _paired(statistic: Any, rows: int, seed: int) -> tuple[float, float, float]:
    """Interval and two-sided p: twice the share of resamples on the other side of nought, each counted at least once."""
    low, high, drawn = _resample(statistic, rows, seed)
    below, above = np.sum(drawn <= 0) + 1, np.sum(drawn >= 0) + 1
    return low, high, float(min(1.0, 2 * min(below, above) / (len(drawn) + 1)))


def _resample(statistic: Any, rows: int, seed: int) -> tuple[float, float, NDArray[np.float64]]:
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.arange(rows),),
        lambda chosen, axis=-1: statistic(np.moveaxis(chosen, axis, -1)),
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(seed),
    )
    return (
        float(found.confidence_interval.low),
        float(found.confidence_interval.high),
        np.asarray(found.bootstrap_distribution),
    )
