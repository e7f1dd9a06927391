"""The manifest: what the trainer knows about an adapter and the gateway must not guess.

It travels as `manifest.json` beside `adapter_config.json` and `adapter_model.safetensors`.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import Fault, InvalidAdapterError

MANIFEST_FILE = "manifest.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseFingerprint(_Frozen):
    """Which weights and which template an adapter was trained on. Two bases with equal digests are the same base."""

    model: str = Field(description="Name for people, such as HuggingFaceTB/SmolLM2-135M-Instruct.")
    revision: str | None = None
    weights_digest: str = Field(description="sha256 (hex) over every tensor's name, dtype, shape and bytes.")
    template_digest: str = Field(description="sha256 (hex) of the served chat template's text.")


class Golden(_Frozen):
    """One prompt with the answer this adapter must give, in token ids, and how likely adapter and base find it.

    Log-probabilities are natural, one per completion token, teacher-forced, computed by the trainer in float32.
    """

    messages: list[dict[str, str]] = Field(description="The prompt as chat messages, for people.")
    completion: str
    prompt_token_ids: list[int]
    completion_token_ids: list[int] = Field(min_length=1)
    logprobs: list[float] = Field(description="Base + adapter.")
    base_logprobs: list[float] = Field(description="Base alone.")


class DataLineage(_Frozen):
    """One data source and the terms it came under."""

    name: str
    digest: str = Field(description="sha256 (hex) of the training file.")
    rows: int
    licence: str
    source: str = ""


class EvaluationScore(_Frozen):
    """One measured figure. `subject` tells who answered."""

    task: str
    metric: str
    subject: Literal["base", "few-shot", "adapter", "predecessor", "merged"]
    value: float
    rows: int


class ServingDefaults(_Frozen):
    """Behaviour that travels with the adapter; callers may override it unless the owner says otherwise."""

    system_prompt: str | None = None
    stop: list[str] = Field(default_factory=list)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, gt=0)


class Manifest(_Frozen):
    """Identity, lineage, evaluation and goldens of one adapter version."""

    schema_version: Literal[1] = 1
    name: str
    base: BaseFingerprint
    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    target_modules: list[str]
    created_at: int = Field(description="Unix seconds.")
    base_licence: str
    data: list[DataLineage] = Field(default_factory=list)
    training: dict[str, Any] = Field(default_factory=dict, description="The training configuration, whole.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Training figures: eval_loss, steps, seconds.")
    scores: list[EvaluationScore] = Field(default_factory=list)
    goldens: list[Golden] = Field(default_factory=list)
    serving: ServingDefaults = ServingDefaults()


def parse_manifest(raw: bytes | str) -> Manifest:
    """Raises InvalidAdapterError, one fault per bad field."""
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as exc:
        raise InvalidAdapterError(
            [
                Fault(
                    code="invalid_manifest",
                    message=f"manifest.json: {error['msg']}",
                    where=f"{MANIFEST_FILE}:" + ".".join(str(part) for part in error["loc"]),
                    fix="Write the manifest with `lorikeet train`, or leave the file out to be probed without one.",
                )
                for error in exc.errors()
            ]
        ) from exc


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has none. Raises InvalidAdapterError."""
    path = folder / MANIFEST_FILE
    return parse_manifest(path.read_bytes()) if path.is_file() else None


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
