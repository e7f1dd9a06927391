"""Rows that belong together: near duplicates, and prompts so alike that they must stand on one side of the split."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Literal

import numpy as np

from trainer.data.digests import BANDS, Said, jaccard, said
from trainer.data.store import Ids, Mask, RowStore

Kind = Literal["text", "prompt"]
REMEMBERED = 4096  # rows whose shingles are kept, since near rows are compared with each other many times


class Groups:
    """Disjoint sets over row numbers; the first row of a set stands for it. Four bytes a row."""

    def __init__(self, rows: int | Ids) -> None:
        """rows: how many, each a set of its own; or the roots of other groups to begin with."""
        self._parent = array("i", range(rows) if isinstance(rows, int) else rows.astype(np.int32).tobytes())

    def find(self, row: int) -> int:
        parent = self._parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(self, one: int, other: int) -> None:
        a, b = self.find(one), self.find(other)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def roots(self) -> Ids:
        """[rows]: the first row of each row's set."""
        parent = np.array(self._parent, dtype=np.int64)
        while not np.array_equal(parent, higher := parent[parent]):
            parent = higher
        return parent


class Neighbours:
    """Looks for near rows: candidates share a band, and are then compared shingle by shingle."""

    def __init__(self, store: RowStore, boilerplate: Callable[[int], frozenset[int]], similarity: float) -> None:
        """boilerplate: row number -> shingles that are the form of its source."""
        self._store = store
        self._similarity = similarity
        self._boilerplate = boilerplate
        self._said = lru_cache(REMEMBERED)(self._read)
        self.compared = 0

    def join_near(self, groups: Groups, kind: Kind, among: Mask) -> None:
        """Join rows of `among` that are near: in all they say and with the same system message, or in their prompts."""
        for band in range(BANDS):
            for one, other in self._store.equal_pairs(f"{kind}{band}", among):
                if groups.find(one) != groups.find(other) and self.near(one, other, kind):
                    groups.join(one, other)

    def near(self, one: int, other: int, kind: Kind) -> bool:
        return self.alike(one, other, kind) >= self._similarity

    def meeting(self, one: Mask, other: Mask, kinds: Iterable[Kind]) -> Iterator[tuple[int, int, float]]:
        """(row of one, row of other, similarity) for all that share a band; a pair may come several times."""
        for kind in kinds:
            for band in range(BANDS):
                for a, b in self._store.meetings(f"{kind}{band}", one, other):
                    yield a, b, self.alike(a, b, kind)

    def alike(self, one: int, other: int, kind: Kind) -> float:
        """Jaccard similarity of two rows' shingles."""
        self.compared += 1
        (a, system_a), (b, system_b) = self._said(one), self._said(other)
        if kind == "prompt":
            return jaccard(a[0], b[0])
        return jaccard(a[0] | a[1], b[0] | b[1]) if system_a == system_b else 0.0

    def _read(self, row: int) -> tuple[tuple[frozenset[int], frozenset[int]], str]:
        words: Said = said(self._store.value(row))
        prompt, answer = words.shingles(self._boilerplate(row))
        return (frozenset(prompt), frozenset(answer)), words.system


def join_equal(groups: Groups, pairs: Iterable[tuple[int, int]]) -> None:
    for one, other in pairs:
        groups.join(one, other)
