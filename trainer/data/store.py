"""What is known of each row while a set is built, on disk: the rows themselves, and a file for each column of numbers.

In memory stay at most a few bytes a row. Rows are numbered from 0 in the order they were read, so columns need no keys.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from trainer.data.formats import Value

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

SORTED_AT_ONCE = 2_000_000  # keys; a column of more is sorted in ranges of its keys, each read from disk
READ_AT_ONCE = 262_144


class RowStore:
    """Appended to first, then read; one process. Lies in a folder of its own, which its owner removes."""

    def __init__(self, folder: Path, columns: Mapping[str, Any], *, sorted_at_once: int = SORTED_AT_ONCE) -> None:
        """columns: name -> numpy type of one number."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._types = {"end": np.dtype(np.uint64), **{name: np.dtype(kind) for name, kind in columns.items()}}
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.column").open("w+b") for name in self._types}
        self._rows = (folder / "rows.jsonl").open("w+b")
        self._size_bytes = 0
        self._sorted_at_once = sorted_at_once
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._files.values(), self._rows):
            file.close()

    def append(self, rows: bytes, sizes_bytes: NDArray[np.uint32], columns: Mapping[str, NDArray[Any]]) -> None:
        """rows: JSON lines one after the other, sizes_bytes: of each; columns: an array of that many for each name."""
        ends = self._size_bytes + np.cumsum(sizes_bytes, dtype=np.uint64)
        for name, values in {"end": ends, **columns}.items():
            self._files[name].write(np.ascontiguousarray(values, dtype=self._types[name]).data)
        self._rows.write(rows)
        self._size_bytes += len(rows)
        self.count += len(sizes_bytes)

    def flush(self) -> None:
        for file in (*self._files.values(), self._rows):
            file.flush()

    def column(self, name: str, first: int = 0, count: int = -1) -> NDArray[Any]:
        """The column, or a part of it, in memory."""
        kind = self._types[name]
        return np.fromfile(self._folder / f"{name}.column", dtype=kind, count=count, offset=first * kind.itemsize)

    def line(self, row: int) -> bytes:
        """The row as JSON, with its line end."""
        first = max(0, row - 1)
        ends = np.frombuffer(os.pread(self._files["end"].fileno(), 16 if row else 8, first * 8), dtype=np.uint64)
        start, end = (int(ends[0]), int(ends[1])) if row else (0, int(ends[0]))
        return os.pread(self._rows.fileno(), end - start, start)

    def value(self, row: int) -> Value:
        value: Value = orjson.loads(self.line(row))
        return value

    def equal_pairs(self, name: str, among: Mask) -> Iterator[tuple[int, int]]:
        """(earlier, later) row for each row of `among` that has an earlier one with the same number, the nearest such.

        Sorts the column in ranges of its keys, so memory does not grow with it.
        """
        for ids, keys in self._in_ranges(name, among):
            order = np.argsort(keys, kind="stable")
            ids, keys = ids[order], keys[order]
            same = np.flatnonzero(keys[1:] == keys[:-1])
            yield from zip(ids[same].tolist(), ids[same + 1].tolist(), strict=True)

    def meetings(self, name: str, one: Mask, other: Mask) -> Iterator[tuple[int, int]]:
        """Every pair of a row of `one` and a row of `other` with the same number. `one` has to fit into memory."""
        ids = np.flatnonzero(one)
        keys = np.concatenate(
            [np.empty(0, np.uint64)]
            + [
                self.column(name, first, READ_AT_ONCE)[one[first : first + READ_AT_ONCE]]
                for first in range(0, self.count, READ_AT_ONCE)
            ]
        )
        order = np.argsort(keys, kind="stable")
        ids, keys = ids[order], keys[order]
        for first in range(0, self.count, READ_AT_ONCE):
            wanted = np.flatnonzero(other[first : first + READ_AT_ONCE])
            met = self.column(name, first, READ_AT_ONCE)[wanted]
            low, high = np.searchsorted(keys, met, "left"), np.searchsorted(keys, met, "right")
            for place in np.flatnonzero(high > low).tolist():
                for row in ids[low[place] : high[place]].tolist():
                    yield row, first + int(wanted[place])

    def _in_ranges(self, name: str, among: Mask) -> Iterator[tuple[Ids, NDArray[np.uint64]]]:
        parts = max(1, -(-self.count // self._sorted_at_once))
        width = (1 << 64) // parts + 1
        for part in range(parts):
            low, high = part * width, min((part + 1) * width, 1 << 64) - 1
            ids: list[Ids] = []
            keys: list[NDArray[np.uint64]] = []
            for first in range(0, self.count, READ_AT_ONCE):
                read = self.column(name, first, READ_AT_ONCE)
                wanted = among[first : first + len(read)]
                if parts > 1:
                    wanted = wanted & (read >= np.uint64(low)) & (read <= np.uint64(high))
                keys.append(read[wanted])
                ids.append(np.flatnonzero(wanted) + first)
            yield np.concatenate(ids or [np.empty(0, np.int64)]), np.concatenate(keys or [np.empty(0, np.uint64)])


def drawn(ids: Ids, seed: int) -> NDArray[np.uint64]:
    """A number for each row that looks random and depends on row and seed only: an order, or a draw (SplitMix64)."""
    start = np.uint64(seed * 0xD1B54A32D192ED03 & 0xFFFF_FFFF_FFFF_FFFF)
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def shuffled(ids: Ids, seed: int) -> Ids:
    return ids[np.argsort(drawn(ids, seed), kind="stable")]
