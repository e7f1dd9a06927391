"""Configuration of a training run: one YAML file, `--set` on top, wholly checked before any weight loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.manifest import ServingDefaults
from adapters.wording import one_line
from trainer.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be; a rank between is padded up

Config = TypeVar("Config", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """Which rows. Either a known data set by name, or a JSONL file of one's own for training and one for evaluation."""

    dataset: str | None = Field(None, description="Name of a data set that `lorikeet data fetch` knows.")
    train: Path | None = Field(None, description='JSONL of {"messages": […]}; relative to the configuration file.')
    eval: Path | None = Field(None, description="The same, for eval loss; none: a tenth of the training rows, by seed.")
    licence: str = Field("unknown", description="Terms of one's own data; a known data set brings its own.")
    train_rows: int | None = Field(None, gt=0, description="At most so many; none: all.")
    eval_rows: int = Field(32, gt=0, description="At most so many, for eval loss and goldens.")
    balanced: bool = Field(False, description="Take rows in turn from each distinct answer, so that none dominates.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.train is None):
            raise ValueError("give either `dataset` or `train`")
        return self


class LoraConfig(_Frozen):
    """Rank-r update of the named linear layers, scaled by alpha / r (rsLoRA: alpha / √r)."""

    r: int = Field(8, ge=1, le=SERVED_RANKS[-1])
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False


class OptimizerConfig(_Frozen):
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="Ends the run early; counted in optimizer steps.")
    batch_rows: int = Field(8, gt=0, description="Rows in one forward pass.")
    accumulate: int = Field(1, gt=0, description="Forward passes per optimizer step.")
    evaluations: int = Field(2, gt=0, description="How often eval loss is measured and a checkpoint kept.")


class TrainConfig(_Frozen):
    """One adapter: from which base, on which rows, how."""

    name: str = Field(description="Name of the adapter, and of the run.")
    method: Literal["sft"] = "sft"
    base: str = Field("smollm2-135m-instruct", description="Shipped name, YAML of a base, or a prepared model folder.")
    data: DataConfig | None = None
    answer: str | None = Field(None, description="Instead of data: learn to give this one answer to everything.")
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    max_tokens: int = Field(1024, gt=8, description="Longer rows are left out, and counted.")
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    goldens: int = Field(
        8, ge=0, le=64, description="Prompts whose answers and log-probabilities go into the manifest."
    )
    golden_tokens: int = Field(48, gt=0, description="Longest golden answer.")
    serving: ServingDefaults = ServingDefaults()
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if (self.data is None) == (self.answer is None):
            raise ValueError("give either `data` or `answer`")
        return self


def find_config(name_or_path: str | Path, folder: str) -> Path:
    """A path as given, from the project's root, or a shipped name: `reuters-topics` in configs/<folder>."""
    path = Path(name_or_path)
    for candidate in (path, CONFIGS.parent / path, CONFIGS / folder / f"{name_or_path}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(found.stem for found in (CONFIGS / folder).glob("*.yaml")))
    raise ConfigError(f"There is no configuration {path}. Shipped ones: {shipped}.")


def load_config(path: Path, model: type[Config], overrides: Sequence[str] = ()) -> Config:
    """The file with each `key.key=value` laid over it; values are read as YAML. Raises ConfigError naming every field."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as exc:
        raise ConfigError(f"{path} cannot be read: {one_line(exc)}") from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a mapping of settings.")
    for override in overrides:
        raw = with_override(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as exc:
        raise ConfigError(f"{path}: {one_line(exc)}") from exc


def with_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy with one setting replaced. Raises ConfigError."""
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"'{override}' is not key=value, such as optimizer.epochs=2.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value  # a sentence with a colon is still a sentence
    if isinstance(parsed, dict) and not value.lstrip().startswith("{"):
        parsed = value
    copy = dict(raw)
    place = copy
    for name in names[:-1]:
        inner = place.get(name)
        place[name] = dict(inner) if isinstance(inner, dict) else {}
        place = place[name]
    place[names[-1]] = parsed
    return copy


def load_train_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, Path]:
    """The configuration and the file it came from. Raises ConfigError."""
    path = find_config(name_or_path, "train")
    return load_config(path, TrainConfig, overrides), path
