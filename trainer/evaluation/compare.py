"""Score the adapter beside its base, plain and few-shot, and its predecessor, on the same rows through the same server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.manifest import EvaluationScore
from trainer.data.chat import Message, Row, answer_of, prompt_of, read_rows
from trainer.data.splits import choose_rows
from trainer.data.training import Fetch
from trainer.errors import EvaluationError
from trainer.evaluation.client import Answer, ChatClient
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.metrics import Judged, judge, mcnemar, summarise

SubjectName = Literal["base", "few-shot", "adapter", "predecessor"]
Advance = Callable[[SubjectName], None]


@dataclass(frozen=True)
class Subject:
    """Who is asked, and with which examples before the question."""

    name: SubjectName
    model: str
    examples: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Answers and metrics of every subject on the same rows."""

    config: EvalConfig
    model: str
    rows: tuple[Row, ...]
    judged: dict[SubjectName, tuple[Judged, ...]]

    @property
    def metrics(self) -> dict[SubjectName, dict[str, float]]:
        return {name: summarise(self.config.task, judged) for name, judged in self.judged.items()}

    def p_against(self, other: SubjectName) -> float | None:
        """Paired two-sided p of the adapter against another subject; None where that one was not asked."""
        if other not in self.judged:
            return None
        first, second = self.judged[other], self.judged["adapter"]
        return mcnemar([row.correct for row in first], [row.correct for row in second])

    def scores(self) -> list[EvaluationScore]:
        """As the manifest keeps them."""
        return [
            EvaluationScore(
                task=self.config.name, metric=metric, subject=name, value=round(value, 4), rows=len(self.rows)
            )
            for name, metrics in self.metrics.items()
            for metric, value in metrics.items()
        ]


def load_rows(config: EvalConfig, *, relative_to: Path, fetch: Fetch) -> tuple[list[Row], list[Row]]:
    """(rows to score, few-shot examples). Raises DataError, FetchError."""
    if config.dataset is not None:
        folder = fetch(config.dataset)
        evaluation, train = folder / "eval.jsonl", folder / "train.jsonl"
    else:
        evaluation = relative_to / str(config.eval)
        train = relative_to / str(config.train)
    rows = choose_rows(read_rows(evaluation), config.rows, balanced=config.balanced)
    examples = choose_rows(read_rows(train), config.shots, balanced=True) if config.shots else []
    return rows, examples


def with_examples(row: Row, examples: Sequence[Row]) -> Row:
    """The row's prompt with solved examples before it, as earlier turns; its own system message leads."""
    prompt = prompt_of(row)
    system: list[Message] = [message for message in prompt if message["role"] == "system"]
    turns = [message for example in examples for message in example if message["role"] != "system"]
    return [*system, *turns, *(message for message in prompt if message["role"] != "system")]


async def subjects_for(
    client: ChatClient, model: str, *, base: str | None, predecessor: str | None, examples: Sequence[Row]
) -> list[Subject]:
    """Raises EvaluationError when the model is not served, or is the base itself."""
    base = base or await client.base_of(model)
    if base == model:
        raise EvaluationError(f"'{model}' is the base model itself. Name an adapter with --model.")
    found = [Subject("base", base)]
    if examples:
        found.append(Subject("few-shot", base, tuple(examples)))
    if predecessor:
        found.append(Subject("predecessor", predecessor))
    return [*found, Subject("adapter", model)]


async def evaluate(
    config: EvalConfig,
    client: ChatClient,
    subjects: Sequence[Subject],
    rows: Sequence[Row],
    *,
    advance: Advance = lambda name: None,
) -> Evaluation:
    """One subject after the other, so that none has to share the engine with its rival. Raises EvaluationError."""
    labels = config.labels or sorted({answer_of(row) for row in rows})
    judged: dict[SubjectName, tuple[Judged, ...]] = {}
    for subject in subjects:
        prompts = [with_examples(row, subject.examples) for row in rows]

        def step(name: SubjectName = subject.name) -> None:
            advance(name)

        answers = await client.answers(
            subject.model, prompts, max_tokens=config.max_tokens, concurrency=config.concurrency, advance=step
        )
        judged[subject.name] = judge_all(config.task, rows, answers, labels)
    return Evaluation(config, next(s.model for s in subjects if s.name == "adapter"), tuple(rows), judged)


def judge_all(task: str, rows: Sequence[Row], answers: Sequence[Answer], labels: Sequence[str]) -> tuple[Judged, ...]:
    return tuple(
        judge(task, answer_of(row), answer.text, stopped=answer.stopped, labels=labels)
        for row, answer in zip(rows, answers, strict=True)
    )
