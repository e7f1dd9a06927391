"""The card of a built data set: what a folder that `lorikeet data build` wrote holds, and its rows one at a time.

train.jsonl, eval.jsonl   the rows, in one of three formats
dataset.json              this card, written last: a folder without it is not a data set
rejected.jsonl            every other row, with its reason
report.json, report.html  how it came about
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.wording import one_line
from trainer.data.chat import Row, row_fault
from trainer.errors import DataError, RowFault

DATASET_FILE = "dataset.json"
TRAIN_FILE = "train.jsonl"
EVAL_FILE = "eval.jsonl"
REJECTED_FILE = "rejected.jsonl"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

DataFormat = Literal["chat", "preference", "text"]
Part = Literal["train", "eval"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartCard(_Frozen):
    """One file of rows."""

    rows: int
    sha256: str
    tokens: int | None = Field(None, description="As the base's template renders them; none: built without a base.")


class TeacherCard(_Frozen):
    """A model whose answers a source holds."""

    name: str
    licence: str = "unknown"


class SourceCard(_Frozen):
    """Where rows came from, and under which terms."""

    name: str
    licence: str
    sha256: str = Field(description="Of the source's file; of several files: of their digests in order.")
    rows: int = Field(description="Rows of it in train.jsonl and eval.jsonl.")
    exceptions: dict[str, str] = Field(default_factory=dict, description="Parts under other terms: part -> licence.")
    teacher: TeacherCard | None = None


class ReceiptSample(_Frozen):
    """One row as the model sees it; `trained` are the spans that count in the loss."""

    text: str
    trained: tuple[str, ...]


class Receipt(_Frozen):
    """Proof of what is trained on: each of `rows` was rendered as in training and compared with what serving computes."""

    base: str
    template_sha256: str
    rows: int = Field(description="Rows rendered and compared.")
    tokens: int
    trained_tokens: int
    end_of_turn_trained: int = Field(description="Answers whose end-of-turn token is trained: all of them.")
    prompts_equal: int = Field(description="Prompts that training and serving render to the same bytes: all of them.")
    samples: tuple[ReceiptSample, ...]


class Dataset(_Frozen):
    """dataset.json."""

    name: str
    format: DataFormat
    seed: int
    train: PartCard
    eval: PartCard
    sources: tuple[SourceCard, ...]
    receipt: Receipt | None = Field(None, description="None where it was built without a base.")


@dataclass(frozen=True)
class Preference:
    """One preference pair: the prompt ends with a user turn, chosen and rejected are the assistant's."""

    prompt: Row
    chosen: Row
    rejected: Row


@dataclass(frozen=True)
class BuiltDataset:
    """A folder that holds a whole data set."""

    folder: Path
    card: Dataset

    def path(self, part: Part) -> Path:
        return self.folder / (TRAIN_FILE if part == "train" else EVAL_FILE)

    def chat_rows(self, part: Part) -> Iterator[Row]:
        """Raises DataError where the set is of another format or a row is broken."""
        for line, value in self._values("chat", part):
            fault = row_fault(value)
            if fault is not None:
                raise DataError(self.path(part), [RowFault(line, fault)])
            yield value["messages"]

    def preferences(self, part: Part) -> Iterator[Preference]:
        """Raises DataError as chat_rows does."""
        for line, value in self._values("preference", part):
            try:
                yield Preference(value["prompt"], value["chosen"], value["rejected"])
            except (KeyError, TypeError) as exc:
                raise DataError(self.path(part), [RowFault(line, f"no preference pair ({exc})")]) from exc

    def texts(self, part: Part) -> Iterator[str]:
        """Raises DataError as chat_rows does."""
        for line, value in self._values("text", part):
            text = value.get("text") if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise DataError(self.path(part), [RowFault(line, 'no "text"')])
            yield text

    def check_digests(self) -> None:
        """Compare both files with the card. Raises DataError where one was changed after it was built."""
        parts: tuple[tuple[Part, PartCard], ...] = (("train", self.card.train), ("eval", self.card.eval))
        for part, card in parts:
            if file_sha256(self.path(part)) != card.sha256:
                raise DataError(self.path(part), [RowFault(0, f"is not the file that {DATASET_FILE} tells of")])

    def _values(self, wanted: DataFormat, part: Part) -> Iterator[tuple[int, Any]]:
        path = self.path(part)
        if self.card.format != wanted:
            raise DataError(path, [RowFault(0, f"holds {self.card.format} rows, and {wanted} rows are needed")])
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield number, orjson.loads(line)
        except (OSError, orjson.JSONDecodeError) as exc:
            raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc


def read_dataset(folder: Path) -> BuiltDataset:
    """The data set that `lorikeet data build` left in `folder`; reads the card, no rows. Raises DataError."""
    path = folder / DATASET_FILE
    try:
        return BuiltDataset(folder, Dataset.model_validate_json(path.read_bytes()))
    except FileNotFoundError as exc:
        raise DataError(path, [RowFault(0, "is missing: no folder that `lorikeet data build` finished")]) from exc
    except (OSError, ValidationError) as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {one_line(exc)}")]) from exc


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
