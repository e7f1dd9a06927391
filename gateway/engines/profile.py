"""Everything that differs between machines an engine runs on: one profile a machine class, in `configs/engines/`.

The command line and the environment are pure functions of a profile, so that a test can hand both to vLLM's own parser.
"""

import ctypes.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.validation import SERVED_MODULES
from adapters.wording import one_line
from gateway.errors import EngineStartError

BASE_NAME = "base"  # what the engine calls the base model; no adapter's engine name is without a '/'
PLUGIN_NAME = "lorikeet"  # entry points of gateway.engines.plugin and .cpu_lora, in pyproject.toml
PROFILES = Path(__file__).parents[2] / "configs" / "engines"

# True of every engine of ours, on any machine. A profile's `env` wins.
ENGINE_ENV = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_PLUGINS": f"{PLUGIN_NAME},lorikeet_fork",  # an allow-list: nothing else that happens to be installed is loaded
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",  # counts what a poisoned cache answers: vllm:corrupted_requests_total
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # an adapter path that looks like a hub id would be fetched on the engine's step thread
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
# Of the gateway's own environment the engine gets neither other vLLM settings (one empty value crashes it, one wrong
# one opens its debug routes) nor the gateway's secrets.
_WITHHELD = ("VLLM_", "LORIKEET_", "OPENAI_", "AWS_", "AZURE_", "GOOGLE_", "PYTEST_")


class EngineProfile(BaseModel):
    """How to run one vLLM on one class of machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    module: str = Field(
        "vllm.entrypoints.launchers.api_server.entry",
        description="Run with `python -m`. The `vllm` command is not used: it needs a distribution named vllm.",
    )
    slots: int = Field(gt=0, description="LoRA slots: adapters that can be in one batch (--max-loras).")
    host_adapters: int = Field(
        gt=0, description="Adapters kept in host memory (--max-cpu-loras). Beyond it a step reads from disk."
    )
    max_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(
        description="Every slot has room for this rank, whatever an adapter's own is (--max-lora-rank)."
    )
    target_modules: tuple[str, ...] = Field(
        SERVED_MODULES, description="Linear layers that adapters may change (--lora-target-modules). Never lm_head."
    )
    max_in_flight: int = Field(gt=0, description="Requests in one batch (--max-num-seqs).")
    context_tokens: int = Field(gt=0, description="Prompt and answer together (--max-model-len).")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    kv_cache_bytes: int | None = Field(None, gt=0, description="None: vLLM measures what is left.")
    eager: bool = Field(False, description="No compilation and no graphs: a fast start.")
    lora: bool = Field(True, description="False: it serves one model and no adapters, whatever is said of LoRA here.")
    dedicated: dict[str, Any] = Field(
        {}, description="What differs in an engine of its own for one merged version, which runs beside this one."
    )
    args: tuple[str, ...] = Field((), description="Further arguments of vLLM.")
    env: dict[str, str] = Field({}, description="Further environment.")
    preload: tuple[str, ...] = Field((), description="Libraries to preload where found, by name as in -lNAME.")
    start_timeout_s: float = Field(gt=0, description="From launch to ready.")
    shutdown_timeout_s: int = Field(
        20, ge=0, description="How long requests in flight may go on after a stop; then they are cut."
    )
    load_s_per_mb: float = Field(gt=0, description="Time every stream stands still while an adapter is loaded.")

    @model_validator(mode="after")
    def _host_covers_slots(self) -> "EngineProfile":
        if self.host_adapters < self.slots:
            raise ValueError(f"host_adapters ({self.host_adapters}) must be at least slots ({self.slots})")
        return self

    @model_validator(mode="after")
    def _dedicated_is_a_profile(self) -> "EngineProfile":
        if self.dedicated:
            dedicated_profile(self)
        return self


def dedicated_profile(profile: EngineProfile) -> EngineProfile:
    """For an engine of its own for one merged version, beside engines of this profile: without LoRA. Raises ValidationError."""
    fields = profile.model_dump(exclude={"dedicated"}) | profile.dedicated
    return EngineProfile.model_validate(fields | {"name": f"{profile.name}-merged", "lora": False})


def load_profile(name_or_path: str | Path) -> EngineProfile:
    """A profile of `configs/engines/` by name, or any YAML file. Raises EngineStartError when there is none or it is wrong."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise EngineStartError(f"There is no engine profile '{name_or_path}'. Known: {known}; or name a YAML file.")
    try:
        return EngineProfile.model_validate({"name": path.stem} | yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, TypeError) as exc:
        raise EngineStartError(f"The engine profile {path} is not valid: {one_line(exc)}") from exc


def on_own_device(profile: EngineProfile, number: int, *, engines: int, visible: str | None) -> EngineProfile:
    """The profile of one of several engines, confined to a GPU of its own; a CPU engine takes no notice. One that names its
    GPU itself keeps it.

    visible: the gateway's own CUDA_VISIBLE_DEVICES. Raises EngineStartError when it names fewer devices than engines.
    """
    if engines == 1 or "CUDA_VISIBLE_DEVICES" in profile.env:
        return profile
    devices = visible.split(",") if visible else [str(device) for device in range(engines)]
    if len(devices) < engines:
        raise EngineStartError(f"{engines} engines need as many devices, but CUDA_VISIBLE_DEVICES is '{visible}'.")
    return profile.model_copy(update={"env": profile.env | {"CUDA_VISIBLE_DEVICES": devices[number]}})


def engine_arguments(profile: EngineProfile, *, model: Path, socket: Path) -> list[str]:
    """vLLM's command-line arguments."""
    arguments = {
        "--model": str(model),
        "--served-model-name": BASE_NAME,
        "--uds": str(socket),
        "--dtype": profile.dtype,
        "--max-model-len": str(profile.context_tokens),
        "--max-num-seqs": str(profile.max_in_flight),
        "--shutdown-timeout": str(profile.shutdown_timeout_s),
    }
    if profile.kv_cache_bytes is not None:
        arguments["--kv-cache-memory-bytes"] = str(profile.kv_cache_bytes)
    flags = ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    # Adapters may bring a template of their own. Nobody but the gateway reaches the socket, and it sends a template only
    # from a version whose uploader, or for a caller whose key, is trusted with one.
    flags.append("--trust-request-chat-template")
    if profile.lora:
        arguments |= {
            "--max-loras": str(profile.slots),
            "--max-cpu-loras": str(profile.host_adapters),
            "--max-lora-rank": str(profile.max_rank),
        }
        flags += ["--enable-lora", "--lora-target-modules", *profile.target_modules]
    if profile.eager:
        flags.append("--enforce-eager")
    return [part for pair in arguments.items() for part in pair] + flags + list(profile.args)


def engine_command(profile: EngineProfile, *, model: Path, socket: Path, python: str = sys.executable) -> list[str]:
    return [python, "-m", profile.module, *engine_arguments(profile, model=model, socket=socket)]


def engine_environment(
    profile: EngineProfile, inherited: Mapping[str, str], *, preload: tuple[str, ...] = ()
) -> dict[str, str]:
    """The engine's whole environment. preload: library names the machine has, from `find_preloads`."""
    kept = {key: value for key, value in inherited.items() if not key.startswith(_WITHHELD)}
    libraries = [*preload, *filter(None, [inherited.get("LD_PRELOAD")])]
    return kept | ENGINE_ENV | profile.env | ({"LD_PRELOAD": ":".join(libraries)} if libraries else {})


def find_preloads(profile: EngineProfile) -> tuple[str, ...]:
    """Those of the profile's libraries that are installed, as the loader knows them. Runs ldconfig: not for the loop."""
    return tuple(filter(None, (ctypes.util.find_library(name) for name in profile.preload)))
