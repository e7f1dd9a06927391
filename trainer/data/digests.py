"""What a row is recognised by: a digest of all it says, one of its prompt, and MinHash bands that near rows share. Pure.

Digests have 64 bits: among a million rows two unlike ones meet with a chance of 3 in 100 million.
"""

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from trainer.data.formats import Value, answered, asked, system_of

Hashes = NDArray[np.uint64]

SHINGLE_WORDS = 3
CHARS_OF_A_WORD = 20  # longer on average: a script without spaces, where shingles of characters serve
SHINGLE_CHARS = 5
BANDS, BAND_ROWS = (
    16,
    8,
)  # finds 95 % of pairs of similarity 0.8 and 99.98 % at 0.9; what it finds is then compared exactly
PERMUTATIONS = BANDS * BAND_ROWS
SEED = 1
BOILERPLATE_SHARE = 0.3  # of a source's rows: a shingle in more of them is part of a form, not of what is said
BOILERPLATE_ROWS = 20  # fewer rows tell nothing about a form

_NOT_WORD = re.compile(r"[\W_]+")
_SCHEME = "affine32"
_PARAMETERS = MinHash(PERMUTATIONS, seed=SEED, scheme=_SCHEME).permutations
_MIX = np.random.RandomState(SEED).randint(0, 2**63, BAND_ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def plain(text: str) -> str:
    """The text without case, punctuation and spaces that do not part words; as it is where it has no words at all."""
    folded = text.casefold()
    return _NOT_WORD.sub(" ", folded).strip() or folded.strip()


def digest(texts: Iterable[str]) -> int:
    """64 bits of texts that are plain already; their borders count."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(texts).encode(), digest_size=8).digest(), "big")


def shingles(text: str) -> list[int]:
    """32-bit hashes of three words in a row of a plain text; of what there is in a shorter one."""
    words = text.split()
    if len(text) > CHARS_OF_A_WORD * len(words):
        runs: Iterable[str] = (text[i : i + SHINGLE_CHARS] for i in range(max(1, len(text) - SHINGLE_CHARS + 1)))
    elif len(words) <= SHINGLE_WORDS:
        runs = [text] if text else []
    else:
        runs = map(" ".join, zip(words, words[1:], words[2:], strict=False))
    return [zlib.crc32(run.encode()) for run in runs]


@dataclass(frozen=True, slots=True)
class Said:
    """A row's texts as they are compared: plain, without system messages."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    system: str

    @property
    def exact(self) -> int:
        """Equal for rows that say the same."""
        return digest(("system", self.system, "prompt", *self.prompt, "answer", *self.answer))

    @property
    def asked(self) -> int:
        """Equal for rows that ask the same."""
        return digest(self.prompt)

    def shingles(self, boilerplate: frozenset[int]) -> tuple[list[int], list[int]]:
        """(prompt's, answer's), without those that are the form of many rows; all of them where nothing else is left."""
        both = [[hash_ for text in texts for hash_ in shingles(text)] for texts in (self.prompt, self.answer)]
        if boilerplate:
            own = [[hash_ for hash_ in hashes if hash_ not in boilerplate] for hashes in both]
            both = [some or all_ for some, all_ in zip(own, both, strict=True)]
        return both[0], both[1]


def said(value: Value) -> Said:
    """A text is its own prompt, and has no answer."""
    prompt = tuple(plain(text) for text in asked(value))
    answer = () if "text" in value else tuple(plain(text) for text in answered(value))
    return Said(prompt, answer, plain(system_of(value)))


class Signer:
    """MinHash signatures, with one sketch's tables for all rows."""

    def __init__(self) -> None:
        self._sketch = MinHash(PERMUTATIONS, seed=SEED, scheme=_SCHEME, hashfunc=_as_is, permutations=_PARAMETERS)

    def sign(self, hashes: Sequence[int]) -> NDArray[np.uint32]:
        """[PERMUTATIONS]; a set's union has the minimum of the signatures."""
        self._sketch.clear()
        self._sketch.update_batch(hashes)
        return np.asarray(self._sketch.hashvalues, dtype=np.uint32)


def _as_is(value: int) -> int:
    return value


def bands(signatures: NDArray[np.uint32]) -> Hashes:
    """[rows, PERMUTATIONS] -> [rows, BANDS]: rows that are near have one of them in common, very likely."""
    parts = signatures.reshape(len(signatures), BANDS, BAND_ROWS).astype(np.uint64)
    return np.asarray((parts * _MIX).sum(axis=2, dtype=np.uint64), dtype=np.uint64)


def jaccard(one: Iterable[int], other: Iterable[int]) -> float:
    """Of two sets of shingles; 0 where both are empty."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a or b else 0.0


def boilerplate_of(rows: Sequence[Said]) -> frozenset[int]:
    """Shingles of a form that many of the rows fill in: a long instruction that each prompt repeats, for instance."""
    distinct = {row.exact: row for row in rows}.values()  # a row that is there many times is no form
    if len(distinct) < BOILERPLATE_ROWS:
        return frozenset()
    seen: Counter[int] = Counter()
    for row in distinct:
        prompt, answer = row.shingles(frozenset())
        seen.update({*prompt, *answer})
    return frozenset(hash_ for hash_, count in seen.items() if count > BOILERPLATE_SHARE * len(distinct))
