"""Which adapter how often: shares by rank, in the order the adapters are listed. Pure."""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from loadtests.parts import ExistingFile, Part


class Uniform(Part):
    kind: Literal["uniform"] = "uniform"


class Zipf(Part):
    """A power law of the rank: share(k) proportional to k ** -exponent (Zipf 1949)."""

    kind: Literal["zipf"]
    exponent: float = Field(1.0, ge=0)


class Geometric(Part):
    """Each rank is asked `ratio` times as often as the one before; what some tools call Zipf."""

    kind: Literal["geometric"]
    ratio: float = Field(gt=0, le=1)


class HotSet(Part):
    """The first `size` adapters share `share` of the requests equally, all others the rest."""

    kind: Literal["hot_set"]
    size: int = Field(gt=0)
    share: float = Field(ge=0, le=1)


class RoundRobin(Part):
    """In turn, exactly: every adapter of a tenant once before any comes again."""

    kind: Literal["round_robin"]


class Weights(Part):
    """As a file says: CSV with columns `adapter` and `weight`, or JSON {adapter: weight}. Others are never asked."""

    kind: Literal["weights"]
    path: ExistingFile = Field(description="Relative to the scenario file.")


AnyPopularity = Uniform | Zipf | Geometric | HotSet | RoundRobin | Weights
Popularity = Annotated[AnyPopularity, Field(discriminator="kind")]
WeightFiles = Mapping[Path, Mapping[str, float]]


def shares(popularity: AnyPopularity, adapters: Sequence[str], files: WeightFiles | None = None) -> NDArray[np.float64]:
    """The share of requests of each adapter; sums to 1. All 0 when a weights file gives none of them a weight."""
    count = len(adapters)
    ranks = np.arange(1, count + 1, dtype=np.float64)
    match popularity:
        case Zipf():
            weights = ranks**-popularity.exponent
        case Geometric():
            weights = popularity.ratio ** (ranks - 1)
        case HotSet() if popularity.size < count:
            hot = popularity.share / popularity.size
            weights = np.where(ranks <= popularity.size, hot, (1 - popularity.share) / (count - popularity.size))
        case Weights():
            weights = np.array([(files or {})[popularity.path].get(name, 0.0) for name in adapters])
        case _:
            weights = np.ones(count)
    return np.asarray(weights / (weights.sum() or 1.0), dtype=np.float64)


def pick(cumulative: Sequence[float], draw: float) -> int:
    """The index that a uniform draw in [0, 1) falls on, under cumulative shares. Never one whose share is 0."""
    return bisect.bisect_right(cumulative, draw * cumulative[-1])
