"""Score the adapter beside its base, plain and few-shot, and its predecessor, on the same rows through the same server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from adapters.manifest import EvaluationScore
from adapters.names import parse_reference
from trainer.data.chat import Message, Row, answer_of, prompt_of, read_rows
from trainer.data.splits import choose_rows
from trainer.data.training import Fetch
from trainer.errors import EvaluationError
from trainer.evaluation.client import Answer, ChatClient
from trainer.evaluation.code import Fence, pass_at_1
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.metrics import Judged, judge, measure
from trainer.evaluation.statistics import Difference, Estimate, Measured, difference, estimate
from trainer.evaluation.text_scores import bertscore, rouge

SubjectName = Literal["base", "few-shot", "adapter", "predecessor"]
Advance = Callable[[SubjectName], None]
BASELINES = ("base", "few-shot")


@dataclass(frozen=True)
class Subject:
    """Who is asked, and with which examples before the question."""

    name: SubjectName
    model: str
    examples: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Use:
    """What answering took: means per request, and latency in seconds at the evaluation's own concurrency."""

    prompt_tokens: float
    output_tokens: float
    p50_s: float
    p95_s: float


@dataclass(frozen=True)
class Evaluation:
    """Answers and metrics of every subject on the same rows."""

    config: EvalConfig
    model: str
    rows: tuple[Row, ...]
    judged: dict[SubjectName, tuple[Judged, ...]]
    models: dict[SubjectName, str] = field(default_factory=dict)
    use: dict[SubjectName, Use] = field(default_factory=dict)

    @cached_property
    def measured(self) -> dict[SubjectName, dict[str, Measured]]:
        return {name: measure(self.config.task, judged) for name, judged in self.judged.items()}

    @cached_property
    def metrics(self) -> dict[SubjectName, dict[str, float]]:
        return {
            name: {metric: estimate.value for metric, estimate in metrics.items()}
            for name, metrics in self.estimates.items()
        }

    @cached_property
    def estimates(self) -> dict[SubjectName, dict[str, Estimate]]:
        return {
            name: {metric: estimate(one, seed=self.config.seed) for metric, one in metrics.items()}
            for name, metrics in self.measured.items()
        }

    @cached_property
    def differences(self) -> dict[SubjectName, dict[str, Difference]]:
        """The adapter less each other subject, on the same rows."""
        own = self.measured["adapter"]
        return {
            name: {
                metric: difference(theirs[metric], one, seed=self.config.seed)
                for metric, one in own.items()
                if metric in theirs
            }
            for name, theirs in self.measured.items()
            if name != "adapter"
        }

    @property
    def deciding(self) -> str:
        return next(iter(self.measured["adapter"]))

    def p_against(self, other: SubjectName) -> float | None:
        """Paired two-sided p of the adapter against another subject; None where that one was not asked."""
        return self.differences[other][self.deciding].p if other in self.judged else None

    def scores(self) -> list[EvaluationScore]:
        """As manifest and registry keep them."""
        return [
            EvaluationScore(
                task=self.config.name,
                metric=metric,
                subject=name,
                value=round(found.value, 4),
                rows=len(self.rows),
                low=round(found.low, 4),
                high=round(found.high, 4),
                p_value=self.differences[name][metric].p if name != "adapter" else None,
            )
            for name, metrics in self.estimates.items()
            for metric, found in metrics.items()
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


@dataclass(frozen=True)
class Rivals:
    """Who is asked beside the adapter. predecessor: its served name; empty: found out from the registry."""

    base: bool = True
    few_shot: bool = True
    predecessor: str | None = None


def parse_rivals(text: str) -> Rivals:
    """`base,few-shot,predecessor` or `base,support@1`: names of baselines, and of a version. Raises EvaluationError."""
    predecessor: str | None = None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name in BASELINES:
            continue
        if predecessor is not None:
            raise EvaluationError(f"One predecessor at a time: '{predecessor or 'predecessor'}' and '{name}' are two.")
        predecessor = "" if name == "predecessor" else name.removeprefix("predecessor=").removeprefix("predecessor@")
        if predecessor and parse_reference(predecessor) is None:
            raise EvaluationError(f"'{name}' is neither base, few-shot, predecessor nor a model such as support@1.")
    if not names:
        raise EvaluationError("Name at least one of base, few-shot, predecessor or a version such as support@1.")
    return Rivals("base" in names, "few-shot" in names, predecessor)


async def subjects_for(
    client: ChatClient,
    model: str,
    *,
    base: str | None,
    predecessor: str | None,
    examples: Sequence[Row],
    plain: bool = True,
) -> list[Subject]:
    """predecessor: its served name; None: none. plain: ask the base without examples too.

    Raises EvaluationError when the model is not served, or is the base itself.
    """
    base = base or await client.base_of(model)
    if base == model:
        raise EvaluationError(f"'{model}' is the base model itself. Name an adapter with --model.")
    found = [Subject("base", base)] if plain else []
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
    schema: Mapping[str, Any] | None = None,
    advance: Advance = lambda name: None,
) -> Evaluation:
    """One subject after the other, so that none has to share the engine with its rival. Raises EvaluationError."""
    labels = config.labels or sorted({answer_of(row) for row in rows})
    judged: dict[SubjectName, tuple[Judged, ...]] = {}
    use: dict[SubjectName, Use] = {}
    for subject in subjects:
        prompts = [with_examples(row, subject.examples) for row in rows]

        def step(name: SubjectName = subject.name) -> None:
            advance(name)

        answers = await client.answers(
            subject.model, prompts, max_tokens=config.max_tokens, concurrency=config.concurrency, advance=step
        )
        judged[subject.name] = judge_all(config, rows, answers, labels, schema)
        use[subject.name] = use_of(answers)
    models = {subject.name: subject.model for subject in subjects}
    return Evaluation(config, models["adapter"], tuple(rows), judged, models, use)


def judge_all(
    config: EvalConfig,
    rows: Sequence[Row],
    answers: Sequence[Answer],
    labels: Sequence[str],
    schema: Mapping[str, Any] | None,
) -> tuple[Judged, ...]:
    wanted, given = [answer_of(row) for row in rows], [answer.text for answer in answers]
    scores: list[dict[str, float]] = [{} for _ in rows]
    if config.task == "code":
        fence = Fence(config.code_timeout_s, config.code_memory_bytes)
        for row, passed in zip(scores, pass_at_1(given, wanted, fence), strict=True):
            row["pass_at_1"] = passed
    if "rouge" in config.likeness:
        for row, found in zip(scores, rouge(wanted, given), strict=True):
            row.update(found)
    if "bertscore" in config.likeness:
        near = bertscore(wanted, given, model=config.bertscore_model, layers=config.bertscore_layers)
        for row, value in zip(scores, near, strict=True):
            row["bertscore"] = value
    return tuple(
        judge(
            config.task, want, answer.text, stopped=answer.stopped, labels=labels, schema=schema, scores=scores[index]
        )
        for index, (want, answer) in enumerate(zip(wanted, answers, strict=True))
    )


def use_of(answers: Sequence[Answer]) -> Use:
    import numpy as np

    latencies = [answer.latency_s for answer in answers]
    return Use(
        float(np.mean([answer.prompt_tokens for answer in answers])),
        float(np.mean([answer.output_tokens for answer in answers])),
        float(np.percentile(latencies, 50)),
        float(np.percentile(latencies, 95)),
    )
