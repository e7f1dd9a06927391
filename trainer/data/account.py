"""The account of a build: what report.json holds and report.html shows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from adapters.licences import Verdict
from trainer.data.card import Dataset

LENGTH_EDGES = (0, 20, 50, 100, 200, 500, 1000, 2000, 4000, 8000)  # characters; the last part is open
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceAccount(_Frozen):
    name: str
    role: str = Field(description="train, evaluation or general.")
    licence: str
    files: int
    read: int
    kept: int = Field(description="Rows in train.jsonl and eval.jsonl.")


class StepAccount(_Frozen):
    """One step: rows that came to it, rows it turned away, and why."""

    name: str
    before: int
    rejected: int
    reasons: dict[str, int]


class Lengths(_Frozen):
    """Characters of the last answer."""

    rows: int
    quantiles: dict[str, float]
    histogram: tuple[int, ...] = Field(description=f"Rows from each of {LENGTH_EDGES} on.")


class Classes(_Frozen):
    """Share of each class, and how far train is from production (total variation distance)."""

    train: dict[str, float]
    eval: dict[str, float]
    production: dict[str, float] | None = None
    before: float | None = Field(None, description="Distance before resampling.")
    distance: float | None = None
    tolerance: float | None = None


class Duplicates(_Frozen):
    exact: int
    near: int
    similarity: float
    same_prompt_groups: int = Field(description="Groups of rows whose prompts are equal or near; kept on one side.")
    largest_group: int
    compared: int = Field(description="Pairs that shared a band and were compared shingle by shingle.")


class Privacy(_Frozen):
    action: str
    rows: int
    found: dict[str, int]
    not_found: str = "Names of people and postal addresses: finding them takes a language model."


class BenchmarkAccount(_Frozen):
    name: str
    rows: int
    contaminated: int = Field(description="Training rows that held some of it, and were turned away.")


class LeakProof(_Frozen):
    """Read back from the written files."""

    eval_rows: int
    train_rows: int
    same_prompt: int = Field(description="Training rows with the prompt of an evaluation row. Must be 0.")
    same_row: int = Field(description="Training rows equal to an evaluation row. Must be 0.")
    near: int = Field(description="Pairs at or above the similarity that counts as near. Must be 0.")
    compared: int = Field(description="Pairs that shared a MinHash band, all of them compared exactly.")
    most_alike: float = Field(description="Highest similarity among them.")
    similarity: float

    @property
    def holds(self) -> bool:
        return self.same_prompt == self.same_row == self.near == 0


class AgreementAccount(_Frozen):
    annotators: tuple[str, str]
    rows: int
    raw: float
    kappa: float | None


class Mix(_Frozen):
    wanted: float
    share: float
    rows: int


class Account(_Frozen):
    """report.json."""

    dataset: Dataset
    sources: tuple[SourceAccount, ...]
    steps: tuple[StepAccount, ...]
    read: int
    pieces: int = Field(description="Rows gained by cutting long texts.")
    normalised: int
    rejected: int
    lengths: dict[str, Lengths]
    classes: Classes | None
    duplicates: Duplicates
    privacy: Privacy
    contamination: tuple[BenchmarkAccount, ...]
    leak_proof: LeakProof
    agreement: tuple[AgreementAccount, ...]
    mix: Mix | None
    licences: Verdict
    allow_licence: str | None
    warnings: tuple[str, ...]


def lengths(chars: NDArray[np.uint32] | Sequence[int]) -> Lengths:
    values = np.asarray(chars, dtype=np.int64)
    counts, _ = np.histogram(values, bins=[*LENGTH_EDGES, np.iinfo(np.int64).max])
    quantiles = np.quantile(values, QUANTILES) if len(values) else np.zeros(len(QUANTILES))
    named = {f"p{round(share * 100)}": float(value) for share, value in zip(QUANTILES, quantiles, strict=True)}
    return Lengths(rows=len(values), quantiles=named, histogram=tuple(int(count) for count in counts))
