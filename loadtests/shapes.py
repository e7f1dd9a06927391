"""What a request looks like: its prompt, its length, and how its client behaves."""

import math
from statistics import NormalDist
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from loadtests.parts import ExistingFile, JsonData, Part


class UniformLengths(Part):
    """Each whole number from low to high equally often."""

    kind: Literal["uniform"]
    low: int = Field(gt=0)
    high: int = Field(gt=0, le=1_000_000)

    @model_validator(mode="after")
    def _in_order(self) -> "UniformLengths":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class LognormalLengths(Part):
    """Half are below the median, few are very long; what lies above `high` becomes `high`."""

    kind: Literal["lognormal"]
    median: float = Field(gt=0)
    sigma: float = Field(gt=0, le=5, description="Standard deviation of the logarithm.")
    high: int = Field(gt=0, le=1_000_000)

    @model_validator(mode="after")
    def _in_order(self) -> "LognormalLengths":
        if self.median > self.high:
            raise ValueError(f"median ({self.median:g}) is above high ({self.high})")
        return self


def _kind_of(value: Any) -> str | None:
    if isinstance(value, dict):
        return str(value.get("kind"))
    return getattr(value, "kind", "number")


Length = Annotated[
    Annotated[int, Field(gt=0, le=1_000_000), Tag("number")]
    | Annotated[UniformLengths, Tag("uniform")]
    | Annotated[LognormalLengths, Tag("lognormal")],
    Discriminator(_kind_of),
]


def length_at(length: Length, draw: float) -> int:
    """The length at quantile `draw` in [0, 1); at least 1. So one uniform draw gives one length, whatever the kind."""
    match length:
        case UniformLengths():
            return length.low + int(draw * (length.high - length.low + 1))
        case LognormalLengths():
            deviation = NormalDist().inv_cdf(draw) if draw > 0 else -math.inf
            return min(max(round(length.median * math.exp(length.sigma * deviation)), 1), length.high)
        case _:
            return length


class BuiltinPrompts(Part):
    """A small list of everyday questions that comes along."""

    kind: Literal["builtin"] = "builtin"


class FilePrompts(Part):
    """One prompt a line: plain text, or JSON objects with `prompt` (.jsonl)."""

    kind: Literal["file"]
    path: ExistingFile = Field(description="Relative to the scenario file.")


class SyntheticPrompts(Part):
    """Random common words. Each is one token of the usual vocabularies."""

    kind: Literal["synthetic"]
    words: Length = Field(description="Words in every prompt: a number, or a distribution.")


Prompts = Annotated[BuiltinPrompts | FilePrompts | SyntheticPrompts, Field(discriminator="kind")]


class SharedPrefix(Part):
    """A common beginning, as a system prompt is, that a prefix cache may hold. The nonce comes after it."""

    words: int = Field(gt=0, le=1_000_000)
    share: float = Field(gt=0, le=1, description="Share of requests that begin with it.")


class Turns(Part):
    """A conversation: each further question is asked when the answer before has come, with all that was said."""

    count: int = Field(gt=1, le=100, description="Questions in all.")
    think_s: float = Field(0.0, ge=0, description="Pause before each further one.")


class Cancel(Part):
    """Clients that leave before their answer is complete."""

    share: float = Field(gt=0, le=1)
    after_s: float = Field(gt=0, description="From the moment the request was sent.")


class SlowReaders(Part):
    """Clients that take their answer in slowly."""

    share: float = Field(gt=0, le=1)
    pause_s: float = Field(gt=0, description="After each read.")


class RequestShape(Part):
    prompts: Prompts = BuiltinPrompts()
    max_tokens: Length = Field(64, description="Output cap of each request: a number, or a distribution.")
    temperature: float = Field(0.0, ge=0)
    streaming_share: float = Field(1.0, ge=0, le=1, description="Share of requests that stream; others give no TTFT.")
    nonce: bool = Field(
        True,
        description="Give each prompt a mark of its own: no prefix cache helps, and no stray answer goes unseen. Shared "
        "prefixes and blocks of traces are then new in every run.",
    )
    shared_prefix: SharedPrefix | None = None
    turns: Turns | None = None
    cancel: Cancel | None = None
    slow_readers: SlowReaders | None = None
    extra: dict[str, JsonData] = Field(default_factory=dict, description="Further fields of the request body.")
