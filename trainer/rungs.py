"""Climb the cheap rungs on a served model: the plain prompt, a few examples in it, the right paragraph pasted in."""

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from trainer.advise import Evidence, Kind, Rung, RungName
from trainer.data.chat import Row, answer_of, prompt_of
from trainer.data.formats import to_value
from trainer.data.reading import read_file
from trainer.data.splits import choose_rows, fingerprint
from trainer.errors import DataError, RowFault
from trainer.evaluation.client import Answer

KEPT = 4000  # rows held in memory; of a larger file the ones with the smallest digests, so always the same
MANY_LABELS = 50
LABEL_CHARS = 60
SHORT_WORDS = 12  # answers longer than that are seldom matched word for word by a good one
MOST_ANSWER_TOKENS = 512
CONTEXT_FIELD = "context"

Ask = Callable[[RungName, list[Row], int], Awaitable[Sequence[Answer]]]  # rung, prompts, most tokens -> answers


@dataclass(frozen=True)
class Example:
    """row: a conversation with the wanted answer last. context: the paragraph that holds the answer, where there is one."""

    row: Row
    context: str


@dataclass(frozen=True)
class Examples:
    """distinct: rows of the file with different prompts, of which `kept` are here, in an order by digest."""

    distinct: int
    kept: tuple[Example, ...]


@dataclass(frozen=True)
class Ladder:
    """What will be asked: `asked` on every rung, `shots` from other rows."""

    kind: Kind
    labels: tuple[str, ...]
    asked: tuple[Example, ...]
    shots: tuple[Row, ...]
    max_tokens: int

    @property
    def rungs(self) -> tuple[RungName, ...]:
        tried: list[RungName] = ["plain"]
        tried += ["few-shot"] if self.shots else []
        tried += ["context"] if all(example.context for example in self.asked) else []
        return tuple(tried)


def read_examples(path: Path, *, context_field: str = CONTEXT_FIELD) -> Examples:
    """Chat, ShareGPT, Alpaca or prompt/completion rows, of any file `lorikeet data build` reads. Raises DataError."""
    faults: list[RowFault] = []
    seen: set[bytes] = set()
    kept: dict[bytes, Example] = {}
    for raw in read_file(path):
        try:
            value = orjson.loads(raw.data)
        except orjson.JSONDecodeError as exc:
            faults.append(RowFault(raw.line, f"not JSON: {exc}"))
            continue
        row = to_value(value, "chat")
        if isinstance(row, str):
            faults.append(RowFault(raw.line, row))
            continue
        digest = hashlib.sha256(fingerprint(row["messages"]).encode()).digest()[:8]
        if digest in seen:
            continue
        seen.add(digest)
        kept[digest] = Example(row["messages"], context_of(value, context_field))
        if len(kept) > 2 * KEPT:
            kept = {digest: kept[digest] for digest in sorted(kept)[:KEPT]}
    if not seen and not faults:
        faults.append(RowFault(0, "holds no rows"))
    if faults:
        raise DataError(path, faults)
    return Examples(len(seen), tuple(kept[digest] for digest in sorted(kept)[:KEPT]))


def context_of(value: dict[str, Any], field: str) -> str:
    """The row's paragraph: a text, or several that are joined."""
    found = value.get(field)
    if isinstance(found, list):
        return "\n\n".join(part for part in found if isinstance(part, str) and part.strip())
    return found.strip() if isinstance(found, str) else ""


def kind_of(answers: Sequence[str]) -> Kind:
    """What the answers are, by their look."""
    from trainer.evaluation.metrics import normalise_label, parse_object

    if sum(parse_object(answer) is not None for answer in answers) >= 0.9 * len(answers):
        return "json"
    labels = Counter(map(normalise_label, answers))
    repeated = len(labels) <= min(MANY_LABELS, max(2, len(answers) // 4))
    if repeated and all(len(label) <= LABEL_CHARS for label in labels):
        return "classification"
    words = sorted(len(answer.split()) for answer in answers)
    return "short text" if words[len(words) // 2] <= SHORT_WORDS else "long text"


def plan_ladder(examples: Examples, *, rows: int, shots: int) -> Ladder:
    """Rows to ask, where there are any with their paragraph, and others for the few-shot prompt, of different answers first."""
    kept = examples.kept
    shots = min(shots, len(kept) // 4)  # of a handful of rows most are to be asked
    count = min(rows, len(kept) - shots)
    with_context = [example for example in kept if example.context]
    first = with_context if len(with_context) >= min(count, len(kept) // 2) else list(kept)
    asked = first[: min(count, len(first))]
    chosen = {id(example) for example in asked}
    others = [example.row for example in kept if id(example) not in chosen]
    kind = kind_of([answer_of(example.row) for example in kept])
    wanted = [answer_of(example.row) for example in asked]
    return Ladder(
        kind=kind,
        labels=tuple(sorted({answer_of(example.row) for example in kept})) if kind == "classification" else (),
        asked=tuple(asked),
        shots=tuple(choose_rows(others, shots, balanced=kind == "classification")),
        max_tokens=min(MOST_ANSWER_TOKENS, max(16, max(len(answer) for answer in wanted))),
    )


def prompts_for(ladder: Ladder, rung: RungName) -> list[Row]:
    """What is sent for each row on this rung."""
    from trainer.evaluation.compare import with_examples

    if rung == "few-shot":
        return [with_examples(example.row, ladder.shots) for example in ladder.asked]
    if rung == "context":
        return [with_context(prompt_of(example.row), example.context) for example in ladder.asked]
    return [prompt_of(example.row) for example in ladder.asked]


def with_context(prompt: Row, context: str) -> Row:
    """The paragraph before the question, as retrieval would paste it."""
    *before, last = prompt
    return [*before, {**last, "content": f"Use this text to answer:\n\n{context}\n\n{last['content']}"}]


async def climb(ladder: Ladder, ask: Ask, *, model: str, data: str, distinct: int) -> Evidence:
    """Every rung on the same rows. Raises EvaluationError."""
    from trainer.evaluation.metrics import mcnemar
    from trainer.evaluation.statistics import estimate, mean_of

    scores: dict[RungName, list[float]] = {}
    rungs = []
    for name in ladder.rungs:
        answers = await ask(name, prompts_for(ladder, name), ladder.max_tokens)
        scores[name], valid = score(ladder, answers)
        found = estimate(mean_of(scores[name]))
        exact = ladder.kind != "long text"
        plain, this = ([value == 1 for value in scores[rung]] for rung in ("plain", name))
        rungs.append(
            Rung(
                name=name,
                score=found.value,
                low=found.low,
                high=found.high,
                valid=sum(valid) / len(valid),
                prompt_tokens=sum(answer.prompt_tokens for answer in answers) / len(answers),
                p_value=mcnemar(plain, this) if exact and name != "plain" else None,
            )
        )
    metrics = {"classification": "accuracy", "long text": "ROUGE-L"}
    return Evidence(
        model=model,
        data=data,
        kind=ladder.kind,
        metric=metrics.get(ladder.kind, "exact match"),
        examples=distinct,
        rows=len(ladder.asked),
        shots=len(ladder.shots),
        rungs=tuple(rungs),
    )


def score(ladder: Ladder, answers: Sequence[Answer]) -> tuple[list[float], list[bool]]:
    """(right or not, for long text likeness; in the wanted form or not), row by row."""
    from trainer.evaluation.metrics import judge
    from trainer.evaluation.text_scores import rouge

    wanted = [answer_of(example.row) for example in ladder.asked]
    task = "text" if ladder.kind.endswith("text") else ladder.kind
    judged = [
        judge(task, want, answer.text, stopped=answer.stopped, labels=ladder.labels)
        for want, answer in zip(wanted, answers, strict=True)
    ]
    valid = [row.valid for row in judged]
    if ladder.kind == "long text":
        return [row["rouge_l"] for row in rouge(wanted, [answer.text for answer in answers])], valid
    return [float(row.correct) for row in judged], valid
