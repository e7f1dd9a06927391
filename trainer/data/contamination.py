"""Does a training row hold what an adapter will be judged by? Whole texts, and runs of 13 words, as GPT-3 was checked.

(Brown et al. 2020, appendix C.) A run that many questions of a benchmark share is its form, and does not count.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.digests import Hashes, digest, plain
from trainer.data.formats import Value, texts_of

GRAM_WORDS = 13
SHORTEST_WORDS = 4  # shorter texts, such as a label or yes, are equal by chance
FORM_ROWS = 10  # a run in more rows of one benchmark is its form

_FACTORS = np.random.RandomState(13).randint(0, 2**63, GRAM_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Benchmark:
    """What is known of one benchmark: sorted digests of its texts and of its runs of words."""

    name: str
    rows: int
    texts: Hashes
    grams: Hashes


@dataclass(frozen=True)
class Contamination:
    benchmark: str
    how: str  # what the rejection says


def word_hashes(words: Sequence[str], cache: dict[str, int]) -> Hashes:
    """[words]; the cache is emptied when it has grown."""
    if len(cache) > 200_000:
        cache.clear()
    found = []
    for word in words:
        hashed = cache.get(word)
        if hashed is None:
            hashed = cache[word] = digest((word,))
        found.append(hashed)
    return np.array(found, dtype=np.uint64)


def grams(words: Sequence[str], cache: dict[str, int]) -> Hashes:
    """Hashes of each run of GRAM_WORDS words; none in a shorter text."""
    count = len(words) - GRAM_WORDS + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = word_hashes(words, cache)
    total = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_FACTORS):
        total += hashes[place : place + count] * factor
    return total ^ (total >> np.uint64(29))


def strings(value: Any) -> Iterator[str]:
    """Every text in a benchmark's row, whatever its fields; not the system messages, which its other rows share."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if value.get("role") != "system":
            for each in value.values():
                yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def read_benchmark(name: str, rows: Iterable[Any]) -> Benchmark:
    cache: dict[str, int] = {}
    texts: set[int] = set()
    seen: list[Hashes] = []
    count = 0
    for row in rows:
        count += 1
        own: list[Hashes] = []
        for text in map(plain, strings(row)):
            words = text.split()
            if len(words) >= SHORTEST_WORDS:
                texts.add(digest((text,)))
            own.append(grams(words, cache))
        seen.append(np.unique(np.concatenate(own)) if own else np.empty(0, dtype=np.uint64))
    found, times = np.unique(np.concatenate(seen) if seen else np.empty(0, dtype=np.uint64), return_counts=True)
    return Benchmark(name, count, np.array(sorted(texts), dtype=np.uint64), found[times <= FORM_ROWS])


class Decontaminator:
    """Compares rows with benchmarks."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self.benchmarks = tuple(benchmarks)
        self._cache: dict[str, int] = {}

    def find(self, value: Value) -> Contamination | None:
        if not self.benchmarks:
            return None
        for text in map(plain, texts_of(value)):
            words = text.split()
            if len(words) < SHORTEST_WORDS:
                continue
            whole = np.array([digest((text,))], dtype=np.uint64)
            runs = grams(words, self._cache)
            for benchmark in self.benchmarks:
                if _among(whole, benchmark.texts).any():
                    return Contamination(benchmark.name, f"a text of {benchmark.name}")
                hits = _among(runs, benchmark.grams)
                if hits.any():
                    at = int(hits.argmax())
                    return Contamination(
                        benchmark.name,
                        f"{GRAM_WORDS} words in a row of {benchmark.name}: '{' '.join(words[at : at + GRAM_WORDS])}'",
                    )
        return None


def _among(wanted: Hashes, ordered: Hashes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if not len(ordered) or not len(wanted):
        return np.zeros(len(wanted), dtype=np.bool_)
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.asarray(ordered[places] == wanted, dtype=np.bool_)
