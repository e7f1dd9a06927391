"""The manifest: what the trainer knows about an adapter and the gateway must not guess.

It travels as `manifest.json` beside `adapter_config.json` and `adapter_model.safetensors`.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import Fault, InvalidAdapterError
from adapters.licences import TRAINING, LicencePolicy, Source, Verdict, judge_licences

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


class Teacher(_Frozen):
    """A model that wrote answers to train on."""

    name: str
    licence: str = Field(description="Its licence, or the terms of the service that ran it, such as openai-terms.")


class DataLineage(_Frozen):
    """One data source and the terms it came under."""

    name: str
    digest: str = Field(description="sha256 (hex) of the training file.")
    rows: int
    licence: str
    source: str = ""
    exceptions: dict[str, str] = Field(default_factory=dict, description="Parts under other terms: part -> licence.")
    teacher: Teacher | None = Field(None, description="Who wrote the answers, where no person did.")


class EvaluationScore(_Frozen):
    """One measured figure. `subject` tells who answered."""

    task: str
    metric: str
    subject: Literal["base", "few-shot", "adapter", "predecessor", "merged"]
    value: float
    rows: int
    low: float | None = Field(None, description="95 % interval of the value.")
    high: float | None = None
    p_value: float | None = Field(
        None, ge=0, le=1, description="Two-sided and paired, row by row: the adapter against this subject."
    )


Sampling = Literal[
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
]
SAMPLING: tuple[str, ...] = get_args(Sampling)
Override = Literal["chat_template", "system_prompt", "stop", Sampling, "max_tokens"]
MAX_TEMPLATE_CHARS = 64 * 1024  # it goes along with every request; the longest published ones are a quarter of that


class ServingDefaults(_Frozen):
    """Behaviour that travels with the adapter; callers may override what is `overridable`."""

    chat_template: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEMPLATE_CHARS,
        description="Jinja template the adapter was trained with, where it is not the base's own.",
    )
    system_prompt: str | None = Field(None, min_length=1, description="For conversations that bring none.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: every token.")
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, gt=0, description="Output cap.")
    overridable: list[Override] = Field(
        default_factory=lambda: [name for name in get_args(Override) if name != "chat_template"],
        description="What callers may set otherwise.",
    )

    @cached_property
    def sampling(self) -> Mapping[str, float]:
        """Sampling parameters that are set."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


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
    licences: Verdict | None = Field(None, description="What the terms of base, data and teachers meant at training.")

    def judge_licences(self, policy: LicencePolicy = TRAINING, *, base_licence: str | None = None) -> Verdict:
        """Judged anew from the sources, which anybody can do; what is recorded is the maker's word.

        base_licence: what is known of the base here, where that is to count instead.
        """
        sources = licence_sources(self.base.model, base_licence or self.base_licence, self.data)
        return judge_licences(sources, policy, name=self.name)


def licence_sources(base: str, base_licence: str, data: Iterable[DataLineage]) -> list[Source]:
    """The base, each data source and each teacher, with their terms."""
    sources = [Source(name=base, kind="base", licence=base_licence)]
    for one in data:
        sources.append(Source(name=one.name, kind="data", licence=one.licence, exceptions=one.exceptions))
        if one.teacher is not None:
            sources.append(Source(name=one.teacher.name, kind="teacher", licence=one.teacher.licence))
    return sources


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
