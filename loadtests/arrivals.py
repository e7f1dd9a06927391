"""When requests are meant to start. Pure: rate and seed in, offsets out, nothing is sent here."""

import math

import numpy as np
from numpy.typing import NDArray

from loadtests.loads import AnyRate, Constant, Gamma, Poisson, Ramp


def arrivals_s(load: AnyRate, duration_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Offsets in [0, duration_s), ascending, of every arrival of an open-loop phase."""
    match load:
        case Constant():
            return _constant(load, duration_s)
        case Poisson():
            return _in_linear_density(load.rate_per_s, load.rate_per_s, duration_s, rng)
        case Ramp():
            return _in_linear_density(load.from_per_s, load.to_per_s, duration_s, rng)
        case Gamma():
            return _renewals(load, duration_s, rng)


def _constant(load: Constant, duration_s: float) -> NDArray[np.float64]:
    """Exactly one arrival every 1 / rate seconds, beginning at 0: gaps have no spread at all."""
    count = math.ceil(load.rate_per_s * duration_s - 1e-9)  # 0.1 * 30 is 3.0000000000000004: three arrivals, not four
    return np.arange(count, dtype=np.float64) / load.rate_per_s


def _in_linear_density(
    from_per_s: float, to_per_s: float, duration_s: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A Poisson process whose rate runs linearly between the two, the same rate included.

    Given their number, the arrivals of one are independent with a density in proportion to the rate. So the number is
    drawn first, and uniform draws go through the inverse of the distribution: no last gap is cut off, no count rounded.
    """
    draws = 1 - rng.random(rng.poisson((from_per_s + to_per_s) / 2 * duration_s))  # in (0, 1]
    # from the quadratic from·x + (to − from)·x²/2 = draw·(from + to)/2, in the form that also holds for equal rates
    root = np.sqrt(from_per_s**2 + draws * (to_per_s**2 - from_per_s**2))
    fractions = draws * (from_per_s + to_per_s) / (from_per_s + root)
    return np.sort(np.minimum(fractions * duration_s, np.nextafter(duration_s, 0)))


def _renewals(load: Gamma, duration_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Gaps of a gamma distribution, as if the process had been running for ever when the phase begins.

    An instant picked at random falls into a gap with a chance in proportion to its length, and such gaps are
    Gamma(shape + 1). Beginning with a whole gap instead would send too many of a bursty load's requests.
    """
    shape = load.cv**-2
    scale_s = 1 / (load.rate_per_s * shape)
    instants = np.array([rng.random() * rng.gamma(shape + 1, scale_s)])
    while instants[-1] < duration_s:
        gaps_s = rng.gamma(shape, scale_s, size=math.ceil(load.rate_per_s * duration_s) + 16)
        instants = np.concatenate([instants, instants[-1] + np.cumsum(gaps_s)])
    return instants[instants < duration_s]
