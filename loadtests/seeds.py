"""Random numbers from the scenario's seed, one stream per purpose, so that no draw depends on how many came before."""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """The same for the same seed and purpose, and independent of every other."""
    name = "\0".join(str(part) for part in (seed, *purpose))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16]))
