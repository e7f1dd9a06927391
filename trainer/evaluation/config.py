"""Configuration of an evaluation: which rows, which task, how many examples the few-shot prompt gets, what else is asked."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.errors import ConfigError
from trainer.evaluation.judge import JudgeConfig

Task = Literal["classification", "json", "text", "code"]


class EvalConfig(BaseModel):
    """Rows are the evaluation split of a known data set, or files of one's own; examples come from the training split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    task: Task = Field(
        description="code: the last message of a row holds the tests that the answer's program has to pass."
    )
    dataset: str | None = Field(None, description="Name of a data set that `lorikeet data fetch` knows.")
    eval: Path | None = Field(None, description='JSONL of {"messages": […]}; relative to this file.')
    train: Path | None = Field(None, description="Where the few-shot examples come from; the same shape.")
    labels: list[str] = Field(
        default_factory=list, description="Classification: every label; empty: those of the rows."
    )
    json_schema: Path | dict[str, Any] | None = Field(
        None,
        description="JSON: what answers have to follow, here or in a file; none: keys and types of the wanted answer.",
    )
    rows: int = Field(100, gt=0)
    balanced: bool = Field(False, description="Take rows in turn from each distinct answer.")
    shots: int = Field(8, ge=0, description="Examples in the few-shot prompt, from distinct answers first.")
    max_tokens: int = Field(64, gt=0)
    concurrency: int = Field(16, gt=0, description="Requests in flight.")
    timeout_s: float = Field(120.0, gt=0, description="For one answer.")
    metrics: list[Literal["rouge", "bertscore"]] | None = Field(
        None, description="Likeness to the wanted text, measured as well. Default: rouge for text, else none."
    )
    bertscore_model: str = Field("roberta-large", description="Folder, or name in the local cache, of an encoder.")
    bertscore_layers: int | None = Field(None, gt=0, description="Which layer of it; needed for a folder.")
    run_code: bool = Field(
        False, description="Run programs that models wrote, in a fenced-in process. Needed for code."
    )
    code_timeout_s: float = Field(5.0, gt=0)
    code_memory_bytes: int = Field(512 << 20, gt=0)
    probes: list[str] = Field(
        default_factory=list, description="Also ask these: names in configs/eval/probes, or files relative to this one."
    )
    judge: JudgeConfig | None = Field(None, description="A model that judges answers.")
    sheet: int = Field(50, ge=0, description="Answers on the sheet for people; 0: no sheet.")
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.eval is None):
            raise ValueError("give either `dataset` or `eval`")
        if self.dataset is None and self.shots and self.train is None:
            raise ValueError("few-shot examples need `train`; or set shots: 0")
        if self.task == "code" and not self.run_code:
            raise ValueError("the task code runs what models wrote: say `run_code: true`")
        return self

    @property
    def likeness(self) -> list[Literal["rouge", "bertscore"]]:
        return self.metrics if self.metrics is not None else ["rouge"] if self.task == "text" else []

    def schema_for(self, relative_to: Path) -> dict[str, Any] | None:
        """The JSON Schema, checked to be one. Raises ConfigError."""
        if self.json_schema is None:
            return None
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        try:
            found = self.json_schema
            if isinstance(found, Path):
                found = json.loads((relative_to / found).read_text(encoding="utf-8"))
            validator_for(found).check_schema(found)
        except (OSError, ValueError, AttributeError) as exc:
            raise ConfigError(f"json_schema {self.json_schema} cannot be read: {exc}") from exc
        except SchemaError as exc:
            raise ConfigError(f"json_schema is no JSON Schema: {exc.message}") from exc
        return dict(found)
