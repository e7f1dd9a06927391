"""From a fine-tuning job of the API to the configuration of a run: the recipe of its base, and what `auto` means. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.wording import one_line
from trainer.config import CONFIGS, LoraConfig, TrainConfig
from trainer.errors import ConfigError

RECIPES = CONFIGS / "jobs.yaml"
# MISSION's 1 to 3 epochs: what a small file needs to be learned, a large one teaches in one.
EPOCHS = ((1_000, 3), (5_000, 2))
LAST_EPOCHS = 1
ROWS_PER_BATCH = 10  # a file fills at least so many batches, or each epoch would be a step or two
CHECKPOINTS = (2, 10)  # fewest and most; between them one an epoch


class Recipe(BaseModel):
    """How jobs on one base are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: str = "bf16"
    max_tokens: int = Field(1024, gt=8)
    lora: LoraConfig = LoraConfig()
    learning_rate: float = Field(2e-4, gt=0)
    dpo_learning_rate: float = Field(2e-5, gt=0)
    beta: float = Field(0.1, gt=0)
    batch_rows: int = Field(8, gt=0)
    batch_size: int = Field(8, gt=0)
    gradient_checkpointing: bool = False
    goldens: int = Field(8, ge=0)


@dataclass(frozen=True)
class Hyperparameters:
    """Every `auto` settled."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None = None  # of dpo

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_recipe(base: str, path: Path = RECIPES) -> Recipe:
    """The recipe for a base by its slug, or the default. Raises ConfigError."""
    recipes = load_recipes(path)
    return recipes.get(base, recipes["default"])


def load_recipes(path: Path) -> dict[str, Recipe]:
    """Every recipe of the file by base, and the `default`. Raises ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        default = raw["default"]
        found = {name: Recipe.model_validate({**default, **changes}) for name, changes in raw["bases"].items()}
        return {**found, "default": Recipe.model_validate(default)}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValidationError) as exc:
        raise ConfigError(f"{path} is no file of job recipes: {one_line(exc)}") from exc


def settle(asked: Mapping[str, Any], recipe: Recipe, *, method: str, rows: int) -> Hyperparameters:
    """asked: of the job, each a number or `auto`. rows: of the training file."""

    def value(name: str, auto: Any) -> Any:
        given = asked.get(name, "auto")
        return auto if given == "auto" else given

    return Hyperparameters(
        n_epochs=value("n_epochs", next((epochs for most, epochs in EPOCHS if rows < most), LAST_EPOCHS)),
        batch_size=value("batch_size", max(1, min(recipe.batch_size, rows // ROWS_PER_BATCH))),
        learning_rate_multiplier=value("learning_rate_multiplier", 1.0),
        beta=value("beta", recipe.beta) if method == "dpo" else None,
    )


def run_config(
    spec: Mapping[str, Any], recipe: Recipe, chosen: Hyperparameters, *, base: str, eval_file: bool, further: bool
) -> TrainConfig:
    """The run of a job whose folder holds train.jsonl, maybe eval.jsonl, and, to go on from, the adapter in `further`.

    Raises ConfigError.
    """
    dpo = spec["method"] == "dpo"
    rows_at_once = max(n for n in range(1, recipe.batch_rows + 1) if chosen.batch_size % n == 0)
    raw = {
        "name": spec["adapter"],
        "method": "dpo" if dpo else "sft",
        "base": base,
        "adapter": "further" if further else None,
        "data": {"train": "train.jsonl", "eval": "eval.jsonl" if eval_file else None},
        "lora": recipe.lora,
        "optimizer": {
            "learning_rate": chosen.learning_rate_multiplier
            * (recipe.dpo_learning_rate if dpo else recipe.learning_rate),
            "epochs": chosen.n_epochs,
            "batch_rows": rows_at_once,
            "accumulate": chosen.batch_size // rows_at_once,
            "evaluations": min(max(chosen.n_epochs, CHECKPOINTS[0]), CHECKPOINTS[1]),
        },
        "max_tokens": recipe.max_tokens,
        "precision": recipe.precision,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "goldens": recipe.goldens,
        "engine": spec.get("engine", "auto"),
        "profile": "servable",
        "seed": spec["seed"],
    }
    if chosen.beta is not None:
        raw["beta"] = chosen.beta
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as exc:
        raise ConfigError(f"This job cannot be trained: {one_line(exc)}") from exc
