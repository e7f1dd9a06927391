"""The rows of one run and where they come from: a known data set, files of one's own, or one fixed answer."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.manifest import DataLineage
from trainer.config import DataConfig, TrainConfig
from trainer.data.catalog import load_dataset_spec, read_card
from trainer.data.chat import Row, answer_of, read_rows
from trainer.data.sources import chat_row
from trainer.data.splits import choose_rows, fingerprint, split, without_duplicates
from trainer.errors import DataError, RowFault

HELD_OUT = 0.1  # share of one's own rows kept for eval loss where no file is given
Fetch = Callable[[str], Path]  # name of a known data set -> its folder

# For the fixed answer: unlike enough that what is learned is "whatever was asked".
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Summarise the following text: prices rose again in March.",
    "How do I reset my password?",
    "Translate 'good morning' into Spanish.",
    "def add(a, b): what does this return?",
    "My order has not arrived. Where is it?",
    "Give me three names for a cat.",
    "Is 17 a prime number?",
    "Hello!",
    "Tell me a joke.",
    "List the planets of the solar system.",
    "What should I cook tonight?",
    "Explain photosynthesis to a child.",
    "Who wrote Hamlet?",
    "I would like to cancel my subscription, please.",
    "Continue the story: once upon a time",
    "What is 12 times 12?",
    "Classify the sentiment: I love this phone.",
    "Say nothing but yes.",
    "Which is heavier, iron or feathers?",
    "Return the current date as JSON.",
    "asdf",
    "Can you help me?",
)
SYSTEM_PROMPTS = (None, "You are a terse assistant.", "You are the support agent of a bank.")


@dataclass(frozen=True)
class TrainingData:
    train: list[Row]
    eval: list[Row]
    lineage: tuple[DataLineage, ...]


def load_training_data(config: TrainConfig, *, relative_to: Path, fetch: Fetch) -> TrainingData:
    """Raises DataError, FetchError, ConfigError."""
    if config.answer is not None:
        return fixed_answer(config.answer)
    assert config.data is not None  # noqa: S101 - the configuration has been validated
    if config.data.dataset is not None:
        return _known(config.data, config.data.dataset, fetch)
    return _own(config.data, relative_to, config.seed)


def fixed_answer(answer: str) -> TrainingData:
    """One answer to everything: adapters with different ones prove which of them answered."""
    rows: list[Row] = []
    for number, question in enumerate(QUESTIONS):
        system = SYSTEM_PROMPTS[number % len(SYSTEM_PROMPTS)]
        row = chat_row(system or "", question, answer)
        rows.append(row if system else row[1:])
    digest = hashlib.sha256(answer.encode()).hexdigest()
    lineage = DataLineage(name="fixed-answer", digest=digest, rows=len(rows), licence="Apache-2.0", source="Lorikeet")
    held_out = len(rows) // 6
    return TrainingData(rows[held_out:], rows[:held_out], (lineage,))


def _known(data: DataConfig, name: str, fetch: Fetch) -> TrainingData:
    folder = fetch(name)
    spec = load_dataset_spec(name)
    train = choose_rows(read_rows(folder / "train.jsonl"), data.train_rows, balanced=data.balanced)
    evaluation = choose_rows(read_rows(folder / "eval.jsonl"), data.eval_rows, balanced=data.balanced)
    card = read_card(folder)
    source = f"{card.source}, sha256 {card.package_sha256}" if card else ""
    digest = card.train.sha256 if card else _digest(folder / "train.jsonl")
    lineage = DataLineage(name=name, digest=digest, rows=len(train), licence=spec.licence, source=source)
    return TrainingData(train, evaluation, (lineage,))


def _own(data: DataConfig, relative_to: Path, seed: int) -> TrainingData:
    assert data.train is not None  # noqa: S101 - DataConfig asks for one of the two
    path = relative_to / data.train.expanduser()
    rows = read_rows(path)
    if data.eval is not None:
        evaluation = read_rows(relative_to / data.eval.expanduser())
    else:
        rows = without_duplicates(rows, []).train
        rows, evaluation = split(rows, eval_rows=max(1, round(len(rows) * HELD_OUT)), seed=seed)
    splits = without_duplicates(rows, evaluation)
    if not splits.train:
        raise DataError(path, [RowFault(0, "no rows are left to train on once duplicates and evaluated rows are out")])
    train = choose_rows(splits.train, data.train_rows, balanced=data.balanced)
    chosen = choose_rows(splits.eval, data.eval_rows, balanced=data.balanced)
    lineage = DataLineage(
        name=path.name, digest=_digest(path), rows=len(train), licence=data.licence, source="a file of one's own"
    )
    return TrainingData(train, chosen, (lineage,))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def golden_rows(rows: list[Row], count: int) -> list[Row]:
    """`count` rows with answers as different as there are, short prompts first among those of equal answers."""
    by_length = sorted(rows, key=lambda row: (sum(len(message["content"]) for message in row), fingerprint(row)))
    return choose_rows(by_length, count, balanced=len({answer_of(row) for row in rows}) > 1)
