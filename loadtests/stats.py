"""Percentiles that are values someone really waited, and how sure we are of them. Pure.

Everything is computed from raw values: never from buckets, never by averaging percentiles.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtests.record import METRICS, Outcome, PhaseWindow, Record

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
RESAMPLES = 2000  # the ends of a 95 % interval then vary by less than the interval's own rounding to a sample
CONFIDENCE = 0.95
CENSORED_SHARE = 0.05  # above it, what was cut off could reach into the P95: it is only a lower bound


def rank_of(percent: float, count: int) -> int:
    """Nearest rank, from 1: the smallest rank with at least `percent` % of `count` values at or below it."""
    # rounding first: 99.9 / 100 * 1000 is 999.0000000000001 and means 999
    return min(max(math.ceil(round(percent * count / 100, 9)), 1), count)


def nearest_rank(ordered: NDArray[np.float64], percent: float) -> float:
    """ordered: ascending, not empty. Always one of the values."""
    return float(ordered[rank_of(percent, len(ordered)) - 1])


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
    count: int
    mean: float
    max: float
    percentiles: Mapping[float, Estimate]

    def percentile(self, percent: float) -> Estimate | None:
        return self.percentiles.get(percent)


def describe(values: Iterable[float], seed: int, percentiles: Sequence[float] = PERCENTILES) -> Distribution | None:
    """None when there are no values."""
    ordered = np.sort(np.fromiter(values, np.float64))
    if not len(ordered):
        return None
    rng = np.random.default_rng(seed)
    return Distribution(
        count=len(ordered),
        mean=float(ordered.mean()),
        max=float(ordered[-1]),
        percentiles={percent: estimate(ordered, percent, rng) for percent in percentiles},
    )


@dataclass(frozen=True)
class Group:
    """Some of the requests of the measured phases: all, one adapter's, or one tenant's."""

    kind: str  # overall, adapter, tenant
    name: str
    outcomes: Mapping[str, int]
    metrics: Mapping[str, Distribution]  # of the ok ones
    refusal: Distribution | None  # sent to refused: latency of the 429 itself
    per_s: float  # ok answers per second of measured time
    output_tokens_per_s: float

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    @property
    def judged(self) -> int:
        """Requests the server is answerable for: not those we gave up."""
        return self.count - self.outcomes.get(Outcome.CANCELLED, 0)

    def share_of(self, outcome: Outcome) -> float:
        return self.outcomes.get(outcome, 0) / self.judged if self.judged else 0.0

    @property
    def success_rate(self) -> float:
        return self.share_of(Outcome.OK)

    @property
    def is_lower_bound(self) -> bool:
        """So many requests were cut off that the percentiles only say `at least`."""
        return self.share_of(Outcome.CENSORED) > CENSORED_SHARE


def group(
    kind: str,
    name: str,
    records: Sequence[Record],
    *,
    measured_s: float,
    seed: int,
    percentiles: Sequence[float] = PERCENTILES,
) -> Group:
    done = [record for record in records if record.outcome is Outcome.OK]
    refused = [r.end_s - r.sent_s for r in records if r.outcome is Outcome.REFUSED and r.end_s and r.sent_s is not None]
    described = {m: describe((v for r in done for v in of(r)), seed, percentiles) for m, of in METRICS.items()}
    return Group(
        kind=kind,
        name=name,
        outcomes=dict(Counter(record.outcome.value for record in records)),
        metrics={metric: d for metric, d in described.items() if d is not None},
        refusal=describe(refused, seed, percentiles),
        per_s=len(done) / measured_s if measured_s else 0.0,
        output_tokens_per_s=sum(record.output_tokens or 0 for record in done) / measured_s if measured_s else 0.0,
    )


def groups(
    records: Sequence[Record], windows: Sequence[PhaseWindow], *, seed: int, percentiles: Sequence[float] = PERCENTILES
) -> list[Group]:
    """Overall, then each adapter (busiest first), then each tenant, over the measured phases only."""
    measured = [window for window in windows if window.measured]
    names = {window.name for window in measured}
    counted = [record for record in records if record.phase in names]
    measured_s = sum(window.end_s - window.start_s for window in measured)

    def of(kind: str, name: str, some: Sequence[Record]) -> Group:
        return group(kind, name, some, measured_s=measured_s, seed=seed, percentiles=percentiles)

    found = [of("overall", "all", counted)]
    for kind in ("adapter", "tenant"):
        sizes = Counter(str(getattr(record, kind)) for record in counted)
        for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            found.append(of(kind, name, [record for record in counted if getattr(record, kind) == name]))
    return found


def error_counts(records: Iterable[Record]) -> list[tuple[str, int]]:
    """Kinds of error, most frequent first."""
    return Counter(r.error for r in records if r.outcome in (Outcome.FAILED, Outcome.REFUSED)).most_common()
