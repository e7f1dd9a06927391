"""Proof that nothing evaluated is trained on: made from the written files, not from what was meant to be written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import orjson

from trainer.data.account import LeakProof
from trainer.data.digests import Hashes, said
from trainer.data.groups import Kind, Neighbours
from trainer.data.pool import in_order
from trainer.data.receipt import Rendering, TokenCounter
from trainer.data.store import Mask

LINES = 2000


@dataclass(frozen=True)
class ReadBack:
    """Lines of a written file, read again. tokens: None without a base."""

    tokens: int | None
    asked: Hashes
    exact: Hashes


@dataclass(frozen=True)
class ReadPart:
    """A written file, read again."""

    rows: int
    tokens: int | None
    asked: Hashes
    exact: Hashes


def reading_back(rendering: Rendering | None) -> Callable[[list[bytes]], ReadBack]:
    counter = TokenCounter(rendering) if rendering else None

    def read(lines: list[bytes]) -> ReadBack:
        rows = [said(orjson.loads(line)) for line in lines]
        return ReadBack(
            counter.count(lines) if counter else None,
            np.array([row.asked for row in rows], dtype=np.uint64),
            np.array([row.exact for row in rows], dtype=np.uint64),
        )

    return read


def read_part(path: Path, rendering: Rendering | None, *, processes: int, tell: Callable[[int], None]) -> ReadPart:
    """Raises TemplateError where a row cannot be rendered."""
    tokens = 0
    asked: list[Hashes] = [np.empty(0, np.uint64)]
    exact: list[Hashes] = [np.empty(0, np.uint64)]
    rows = 0
    for lines, back in in_order(reading_back, rendering, _batches(path), processes=processes):
        rows += len(lines)
        tokens += back.tokens or 0
        asked.append(back.asked)
        exact.append(back.exact)
        tell(rows)
    return ReadPart(rows, tokens if rendering else None, np.concatenate(asked), np.concatenate(exact))


def _batches(path: Path) -> Iterator[list[bytes]]:
    with path.open("rb") as lines:
        while batch := list(islice(lines, LINES)):
            yield batch


def prove(
    train: ReadPart,
    evaluation: ReadPart,
    *,
    trained: Mask,
    held_out: Mask,
    neighbours: Neighbours,
    similarity: float,
    kinds: tuple[Kind, ...],
) -> LeakProof:
    """trained, held_out: rows of the store in each file, for the search for near ones."""
    pairs = near = 0
    most = 0.0
    for _, _, alike in neighbours.meeting(held_out, trained, kinds):
        pairs += 1
        near += alike >= similarity
        most = max(most, alike)
    return LeakProof(
        eval_rows=evaluation.rows,
        train_rows=train.rows,
        same_prompt=int(np.isin(train.asked, evaluation.asked).sum()),
        same_row=int(np.isin(train.exact, evaluation.exact).sum()),
        near=near,
        compared=pairs,
        most_alike=round(most, 4),
        similarity=similarity,
    )
