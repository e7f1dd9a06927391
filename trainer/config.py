"""Configuration of a training run: one YAML file, `--set` on top, wholly checked before any weight loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from adapters.manifest import ServingDefaults
from adapters.wording import one_line
from trainer.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be; a rank between is padded up

Method = Literal["sft", "pretrain", "dpo"]
Tuning = Literal["lora", "qlora", "full"]
Profile = Literal["servable", "merge-only"]
Config = TypeVar("Config", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """Which rows: a known data set by name, a folder that `lorikeet data build` wrote, or JSONL files of one's own.

    Rows are chat ({"messages": […]}) for sft, text ({"text": …}) for pretrain, pairs ({"prompt", "chosen", "rejected"},
    each a list of messages) for dpo.
    """

    dataset: str | None = Field(None, description="Name of a data set that `lorikeet data fetch` knows.")
    folder: Path | None = Field(
        None, description="What `lorikeet data build` wrote; relative to the configuration file."
    )
    train: Path | None = Field(None, description="JSONL of rows; relative to the configuration file.")
    eval: Path | None = Field(None, description="The same, for eval loss; none: a tenth of the training rows, by seed.")
    licence: str = Field("unknown", description="Terms of `train`; a known or built data set brings its own.")
    train_rows: int | None = Field(None, gt=0, description="At most so many; none: all.")
    eval_rows: int = Field(32, gt=0, description="At most so many, for eval loss and goldens.")
    balanced: bool = Field(False, description="Take rows in turn from each distinct answer, so that none dominates.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.dataset, self.folder, self.train)) != 1:
            raise ValueError("give exactly one of `dataset`, `folder` and `train`")
        if self.eval is not None and self.train is None:
            raise ValueError("`eval` goes with `train`; a data set brings its own rows to evaluate on")
        return self


class LoraConfig(_Frozen):
    """Rank-r update of linear layers, scaled by alpha / r (rsLoRA: alpha / √r)."""

    r: int = Field(8, ge=1, le=SERVED_RANKS[-1])
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field("all-linear", min_length=1)
    rslora: bool = Field(False, description="Rank-stabilised scale (Kalajdzievski 2023), for high ranks.")
    dora: bool = Field(
        False, description="Magnitudes trained as well (Liu et al. 2024). Merge-only: no engine shares it."
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=SERVED_RANKS[-1])]] = Field(
        default_factory=dict, description="Other ranks by layer name: {down_proj: 16, layers.0.self_attn.q_proj: 4}."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Other alphas by layer name."
    )

    @field_validator("target_modules")
    @classmethod
    def _linear_layers(cls, targets: str | list[str]) -> str | list[str]:
        named = {target.rpartition(".")[2] for target in targets} if isinstance(targets, list) else set()
        if named & {"lm_head", "embed_tokens"}:
            raise ValueError(
                "embeddings and the output head are no layers for LoRA: no shared engine serves them, and where both are "
                "one matrix, as in most small models, merging changes the other as well"
            )
        return targets

    @property
    def max_rank(self) -> int:
        return max([self.r, *self.rank_pattern.values()])


class OptimizerConfig(_Frozen):
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="Ends the run early; counted in optimizer steps.")
    batch_rows: int = Field(8, gt=0, description="Rows in one forward pass of one process.")
    accumulate: int = Field(1, gt=0, description="Forward passes per optimizer step.")
    evaluations: int = Field(2, gt=0, description="How often eval loss is measured and a checkpoint kept.")
    patience: int | None = Field(
        None, gt=0, description="Stop after so many evaluations in a row that did not lower the eval loss; none: never."
    )


class StageConfig(_Frozen):
    """One course of training: what is learned from which rows."""

    method: Method = Field(
        "sft", description="sft: answers of a chat. pretrain: raw text. dpo: preferred answers over rejected ones."
    )
    data: DataConfig | None = None
    answer: str | None = Field(None, description="Instead of data: learn to give this one answer to everything.")
    optimizer: OptimizerConfig = OptimizerConfig()
    max_tokens: int = Field(1024, gt=8, description="Longer rows are left out, and counted; raw text is cut to it.")
    packing: bool = Field(
        False, description="Short rows share a sequence of max_tokens without seeing each other; pretrain always packs."
    )
    beta: float = Field(0.1, gt=0, description="dpo: how strongly the adapter is held to where it began.")

    @property
    def packs(self) -> bool:
        return self.packing or self.method == "pretrain"

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if self.answer is not None and self.method != "sft":
            raise ValueError(f"`answer` is learned by method sft, not {self.method}")
        if self.data is not None and self.data.dataset is not None and self.method != "sft":
            raise ValueError(f"`data.dataset` holds chat rows, which method {self.method} cannot use")
        if self.data is not None and self.data.balanced and self.method != "sft":
            raise ValueError("`data.balanced` takes rows by their answer, so it goes with method sft")
        if self.packing and self.method == "dpo":
            raise ValueError("preference pairs cannot be packed; leave `packing` out")
        return self


class TrainConfig(StageConfig):
    """One adapter, or one whole model: from which base, on which rows, how."""

    name: str = Field(description="Name of the adapter, and of the run.")
    base: str = Field("smollm2-135m-instruct", description="Shipped name, YAML of a base, or a prepared model folder.")
    adapter: Path | None = Field(
        None, description="Go on training this adapter's folder; relative to the configuration file. Its LoRA is kept."
    )
    stages: tuple[StageConfig, ...] = Field(
        (),
        description="Several courses on the same weights, such as pretrain then sft, instead of method and data. What a "
        "stage does not say it has from the top of the file.",
    )
    tuning: Tuning = Field(
        "lora",
        description="lora: low-rank updates. qlora: the same over a base in NF4. full: every weight, merge-only.",
    )
    lora: LoraConfig = LoraConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    engine: str = Field(
        "auto", description="Profile in configs/engines that is to serve the result; auto: the one for this machine."
    )
    profile: Profile | None = Field(
        None,
        description="servable: refuse what that engine cannot share. merge-only: accept it. None: derived, and told.",
    )
    goldens: int = Field(
        8, ge=0, le=64, description="Prompts whose answers and log-probabilities go into the manifest."
    )
    golden_tokens: int = Field(48, gt=0, description="Longest golden answer.")
    serving: ServingDefaults = ServingDefaults()
    tracking: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        "none", description="Where metrics go besides the run's own metrics.jsonl."
    )
    licence_exceptions: dict[str, str] = Field(
        default_factory=dict, description="Source -> recorded reason why its terms are no hindrance here."
    )
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list | tuple):
            return raw
        shared = {name: raw[name] for name in ("optimizer", "max_tokens", "packing", "beta") if name in raw}
        stages = [{**shared, **stage} if isinstance(stage, dict) else stage for stage in raw["stages"]]
        return {**raw, "stages": stages}

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.stages and (self.data is not None or self.answer is not None or self.method != "sft"):
            raise ValueError("with `stages`, method, data and answer belong into each stage")
        for number, stage in enumerate(self.courses, start=1):
            if (stage.data is None) == (stage.answer is None):
                raise ValueError("give either `data` or `answer`" + (f" in stage {number}" if self.stages else ""))
        return self

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> Self:
        if self.tuning == "full" and self.adapter is not None:
            raise ValueError("`tuning: full` trains no adapter, so it cannot go on with one; merge it first")
        if self.profile == "servable" and self.intrinsic_profile == "merge-only":
            kind = "full fine-tuning" if self.tuning == "full" else "lora.dora"
            raise ValueError(f"`profile: servable` and {kind} exclude each other: no engine can share the result")
        return self

    @property
    def courses(self) -> tuple[StageConfig, ...]:
        """The stages, or the one that the file itself is."""
        return self.stages or (self,)

    @property
    def intrinsic_profile(self) -> Profile:
        """What the kind of weights allows on any engine."""
        return "merge-only" if self.tuning == "full" or self.lora.dora else "servable"


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
