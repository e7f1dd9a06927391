"""May the engine that is to serve it share what a configuration will train? Said before any weight loads, and again at the end.

The rules are those of `adapters.validation`; the engine's limits stand in its profile in configs/engines.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapters.base import BaseModelInfo
from adapters.errors import Fault, InvalidAdapterError
from adapters.merge import MERGEABLE, NO_LIMITS
from adapters.validation import SERVED_MODULES, EngineLimits, plan_faults, validate_adapter
from adapters.wording import one_line
from trainer.config import CONFIGS, LoraConfig, Profile, TrainConfig
from trainer.errors import ConfigError, TrainingError

# Not linear layers that "all-linear" means, though bases list them among theirs.
NOT_LINEAR = frozenset({"lm_head", "embed_tokens"})


@dataclass(frozen=True)
class ServingEngine:
    name: str
    limits: EngineLimits


@dataclass(frozen=True)
class Servability:
    """The verdict. reasons: why it is merge-only; empty for a servable one."""

    profile: Profile
    engine: str
    reasons: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        if self.profile == "servable":
            return f"Servable: engine '{self.engine}' can share it with other adapters."
        return f"Merge-only, served by an engine of its own once merged: {' '.join(self.reasons)}"


def load_engine(name: str) -> ServingEngine:
    """A profile by name or path; auto: LORIKEET_ENGINE, then the gateway's settings, then what fits this machine.

    Raises ConfigError.
    """
    if name == "auto":
        name = os.environ.get("LORIKEET_ENGINE") or _of_gateway() or "auto"
    if name == "auto":
        name = "gpu-24gb" if shutil.which("nvidia-smi") else "cpu"
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / "engines" / f"{name}.yaml"
    raw = _read(path, name)
    try:
        modules = raw.get("target_modules", SERVED_MODULES)
        return ServingEngine(path.stem, EngineLimits(int(raw["max_rank"]), frozenset(modules)))
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"The engine profile {path} is not valid: {one_line(exc)}") from exc


def _of_gateway() -> str | None:
    path = CONFIGS / "gateway.yaml"
    return _read(path, "gateway").get("engine") if path.is_file() else None


def _read(path: Path, name: str) -> dict[str, Any]:
    known = ", ".join(sorted(file.stem for file in (CONFIGS / "engines").glob("*.yaml")))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as exc:
        raise ConfigError(f"There is no engine profile '{name}' to read: {one_line(exc)}. Known: {known}.") from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a mapping of settings.")
    return raw


def planned_config(lora: LoraConfig, base: BaseModelInfo) -> dict[str, Any]:
    """adapter_config.json as far as it is known before training."""
    targets: Sequence[str] = sorted({module.rsplit(".", 1)[-1] for module in base.modules} - NOT_LINEAR)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "target_modules": list(targets if lora.target_modules == "all-linear" else lora.target_modules),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
    }


def judge_plan(config: TrainConfig, lora: LoraConfig, base: BaseModelInfo, engine: ServingEngine) -> Servability:
    """Raises TrainingError for what that engine cannot share, unless the configuration says that it will be merged."""
    if config.tuning == "full":
        return Servability("merge-only", engine.name, ("Every weight of the base is trained.",))
    faults = plan_faults(planned_config(lora, base), base, engine.limits)
    mergeable = [fault for fault in faults if fault.code in MERGEABLE or fault.code in _OF_THE_ENGINE]
    fatal = [fault for fault in faults if fault not in mergeable]
    intended = config.profile == "merge-only" or all(fault.code in MERGEABLE for fault in mergeable)
    if fatal or (mergeable and not intended) or (mergeable and config.profile == "servable"):
        shown = "\n".join(f"{fault.message} {fault.fix}" for fault in fatal or mergeable)
        hint = "" if fatal else "\nOr set `profile: merge-only` to have it merged into a model of its own."
        raise TrainingError(f"The result could not be served by engine '{engine.name}'.\n{shown}{hint}")
    if not mergeable and config.profile != "merge-only":
        return Servability("servable", engine.name)
    reasons = [fault.message for fault in mergeable] or ["The configuration says so."]
    return Servability("merge-only", engine.name, tuple(reasons))


# Faults of an adapter that some other engine, or one of its own, would serve.
_OF_THE_ENGINE = frozenset({"rank_too_high", "module_not_served"})


def check_trained(folder: Path, base: BaseModelInfo, engine: ServingEngine, profile: Profile) -> None:
    """The same rules on the finished files. Raises TrainingError that names every fault; the files stay where they are."""
    faults = faults_of(folder, base, engine.limits if profile == "servable" else NO_LIMITS)
    if profile == "merge-only":
        faults = [fault for fault in faults if fault.code not in MERGEABLE]
    if faults:
        told = "\n".join(f"{fault.message} {fault.fix}" for fault in faults)
        raise TrainingError(f"The adapter in {folder} is trained, but must not be used:\n{told}")


def faults_of(folder: Path, base: BaseModelInfo, limits: EngineLimits) -> Sequence[Fault]:
    try:
        validate_adapter(folder, base, limits)
    except InvalidAdapterError as exc:
        return exc.faults
    return ()


def check_start(folder: Path, base: BaseModelInfo) -> None:
    """An adapter that is to be gone on with belongs to this base and is whole. Raises TrainingError."""
    if not folder.is_dir():
        raise TrainingError(f"There is no adapter folder {folder} to go on from.")
    faults = [fault for fault in faults_of(folder, base, NO_LIMITS) if fault.code not in MERGEABLE]
    if faults:
        told = "\n".join(fault.message for fault in faults)
        raise TrainingError(f"Training cannot go on from {folder}:\n{told}")


def as_document(verdict: Servability) -> Mapping[str, Any]:
    return {"profile": verdict.profile, "engine": verdict.engine, "reasons": list(verdict.reasons)}
