"""Kinds of load: when requests come. Open loops send at planned instants, whatever the server does."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loadtests.parts import ExistingFile, Part


class Poisson(Part):
    """Open loop, as independent users make it: exponential gaps."""

    kind: Literal["poisson"] = "poisson"
    rate_per_s: float = Field(gt=0, description="Mean arrivals per second.")


class Constant(Part):
    """Open loop with exactly equal gaps."""

    kind: Literal["constant"]
    rate_per_s: float = Field(gt=0, description="Arrivals per second.")


class Gamma(Part):
    """Open loop with gamma-distributed gaps: bursts and lulls where cv is above 1, nearly a metronome where below."""

    kind: Literal["gamma"]
    rate_per_s: float = Field(gt=0, description="Mean arrivals per second.")
    cv: float = Field(gt=0, le=100, description="Coefficient of variation of the gaps; 1 is Poisson.")


class Ramp(Part):
    """Open loop: a Poisson process whose rate changes linearly over the phase."""

    kind: Literal["ramp"]
    from_per_s: float = Field(ge=0, description="Arrivals per second at the phase's start.")
    to_per_s: float = Field(ge=0, description="Arrivals per second at its end.")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> "Ramp":
        if not self.from_per_s and not self.to_per_s:
            raise ValueError("from_per_s and to_per_s are both 0: nothing would be sent")
        return self


class TraceLoad(Part):
    """Open loop: arrivals and token lengths of a recorded service.

    Public traces name neither tenant nor adapter, so each session of one is given both: a tenant by its share, and
    one of the tenant's adapters by Zipf.
    """

    kind: Literal["trace"]
    path: ExistingFile = Field(description="Relative to the scenario file.")
    format: Literal["azure", "burstgpt", "mooncake"]
    speed: float = Field(1.0, gt=0, description="2 replays in half the time, at twice the rate.")
    start_s: float = Field(0.0, ge=0, description="Where to begin, in the trace's own seconds from its first row.")
    sessions: float = Field(1.0, ge=0, description="Zipf exponent by which sessions are spread over adapters.")


class Touch(Part):
    """Each adapter twice in a row ("first", "again"), then all once more in the same order ("after_eviction").

    With more adapters than LoRA slots the last round finds every adapter evicted.
    """

    kind: Literal["touch"]
    gap_s: float = Field(gt=0, description="Between two requests: longer than a cold answer takes.")


class Closed(Part):
    """Closed loop: each of `concurrency` callers waits for its answer before it asks again.

    A stalled server is then simply asked less, so its stall hardly shows: use an open loop to judge latency.
    """

    kind: Literal["closed"]
    concurrency: int = Field(gt=0, description="Callers that are never idle.")
    think_s: float = Field(0.0, ge=0, description="Pause of a caller between answer and next request.")


AnyRate = Poisson | Constant | Gamma | Ramp  # loads that are a rate, and nothing else
AnyLoad = AnyRate | TraceLoad | Touch | Closed
RateLoad = Annotated[AnyRate, Field(discriminator="kind")]
Load = Annotated[AnyLoad, Field(discriminator="kind")]


def describe_load(load: AnyLoad) -> str:
    match load:
        case Poisson():
            return f"Poisson arrivals, {load.rate_per_s:g}/s (open loop)"
        case Constant():
            return f"constant arrivals, {load.rate_per_s:g}/s exactly (open loop)"
        case Gamma():
            return f"gamma arrivals, {load.rate_per_s:g}/s, gaps with CV {load.cv:g} (open loop)"
        case Ramp():
            return f"Poisson arrivals from {load.from_per_s:g}/s to {load.to_per_s:g}/s (open loop)"
        case TraceLoad():
            return f"arrivals of {load.path.name} at {load.speed:g} times their speed (open loop)"
        case Touch():
            return f"each adapter twice, then all once more, {load.gap_s:g} s apart (open loop)"
        case Closed():
            return f"{load.concurrency} callers that wait for their answers (closed loop: hides queues)"
