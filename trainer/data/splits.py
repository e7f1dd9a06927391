"""Choose rows: without duplicates, without leaks from the evaluation rows, the same ones for the same seed. Pure."""

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.data.chat import Row, answer_of, prompt_of

_NOT_WORD = re.compile(r"\W+")


def fingerprint(row: Row) -> str:
    """Equal for rows whose user and assistant turns before the last answer differ in case, spaces or punctuation only."""
    said = "\n".join(message["content"] for message in prompt_of(row) if message["role"] != "system")
    return hashlib.sha256(_NOT_WORD.sub(" ", said.casefold()).strip().encode()).hexdigest()


@dataclass(frozen=True)
class Splits:
    train: list[Row]
    eval: list[Row]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


def without_duplicates(train: Sequence[Row], evaluation: Sequence[Row]) -> Splits:
    """Keep the first of equal prompts; a training row whose prompt is evaluated too is a leak and goes."""
    dropped = {"duplicate": 0, "leak": 0}
    seen: set[str] = set()
    kept_eval: list[Row] = []
    for row in evaluation:
        key = fingerprint(row)
        if key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            kept_eval.append(row)
    evaluated = frozenset(seen)
    kept_train: list[Row] = []
    for row in train:
        key = fingerprint(row)
        if key in evaluated:
            dropped["leak"] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            kept_train.append(row)
    return Splits(kept_train, kept_eval, dropped)


def split(rows: Sequence[Row], *, eval_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, eval) for data without a published split."""
    shuffled = shuffle(rows, seed=seed)
    return shuffled[eval_rows:], shuffled[:eval_rows]


def shuffle(rows: Sequence[Row], *, seed: int) -> list[Row]:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - a reproducible order, no secret
    return shuffled


def choose_rows(rows: Sequence[Row], count: int | None, *, balanced: bool = False) -> list[Row]:
    """The first `count` rows; balanced: in turn from each distinct answer, the commonest first."""
    if not balanced:
        return list(rows[:count])
    by_answer: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_answer[answer_of(row)].append(row)
    rounds = max((len(group) for group in by_answer.values()), default=0)
    groups = [group for _, group in sorted(by_answer.items(), key=lambda item: (-len(item[1]), item[0]))]
    in_turn = [group[index] for index in range(rounds) for group in groups if index < len(group)]
    return in_turn[:count]
