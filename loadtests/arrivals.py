"""When requests are meant to start. Pure: rate and seed in, offsets out, nothing is sent here."""

import math

import numpy as np
from numpy.typing import NDArray

from loadtests.scenario import Constant, Poisson


def arrivals_s(load: Poisson | Constant, duration_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Offsets in [0, duration_s), ascending, of every arrival of an open-loop phase.

    Constant: exactly one arrival every 1 / rate seconds, beginning at 0 (gaps have no spread at all).
    Poisson: a true Poisson process. Given their number, the arrivals of one are independent and uniform, so the
    number is drawn first and the instants are sorted uniforms: no last gap is cut off, no count is rounded.
    """
    expected = load.rate_per_s * duration_s
    if isinstance(load, Constant):
        count = math.ceil(expected - 1e-9)  # 0.1 * 30 is 3.0000000000000004: still three arrivals, not four
        return np.arange(count, dtype=np.float64) / load.rate_per_s
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(expected)))
