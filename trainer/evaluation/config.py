"""Configuration of an evaluation: which rows, which task, how many examples the few-shot prompt gets."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EvalConfig(BaseModel):
    """Rows are the evaluation split of a known data set, or files of one's own; examples come from the training split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    task: Literal["classification", "json"]
    dataset: str | None = Field(None, description="Name of a data set that `lorikeet data fetch` knows.")
    eval: Path | None = Field(None, description='JSONL of {"messages": […]}; relative to this file.')
    train: Path | None = Field(None, description="Where the few-shot examples come from; the same shape.")
    labels: list[str] = Field(
        default_factory=list, description="Classification: every label; empty: those of the rows."
    )
    rows: int = Field(100, gt=0)
    balanced: bool = Field(False, description="Take rows in turn from each distinct answer.")
    shots: int = Field(8, ge=0, description="Examples in the few-shot prompt, from distinct answers first.")
    max_tokens: int = Field(64, gt=0)
    concurrency: int = Field(16, gt=0, description="Requests in flight.")
    timeout_s: float = Field(120.0, gt=0, description="For one answer.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.eval is None):
            raise ValueError("give either `dataset` or `eval`")
        if self.dataset is None and self.shots and self.train is None:
            raise ValueError("few-shot examples need `train`; or set shots: 0")
        return self
