"""Prompt, retrieve or fine-tune? A decision from facts about a task, with its reasons. Pure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FEW = 100  # below: examples go further in the prompt than in weights
ENOUGH = 1_000  # from here on fine-tuning is worth it where there are reasons for it
TIGHT_LATENCY_MS = 500  # long instructions and examples in every prompt cost more time than this leaves
REASONS_NEEDED = 2  # one reason alone is usually met more cheaply

Approach = Literal["prompting", "rag", "fine-tuning"]


class TaskFacts(BaseModel):
    """What is known about a task. Everything has a neutral default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int = Field(0, ge=0, description="Good examples at hand: input with the answer you want.")
    gap: Literal["knowledge", "behaviour", "both", "none"] = Field(
        "none", description="What the base lacks: facts, or a way of answering (style, format, tools)."
    )
    facts_change: Literal["never", "yearly", "monthly", "daily"] = Field(
        "never", description="How often the facts change that answers depend on."
    )
    strict_format: bool = Field(False, description="Answers must follow a schema, a label set or a tool protocol.")
    latency_ms: int | None = Field(None, gt=0, description="Latency an answer may take; none: no tight limit.")
    cost_matters: bool = Field(False, description="So many requests that a long prompt in each is too dear.")
    few_shot_works: bool | None = Field(None, description="Is the prompted base good enough? none: not measured yet.")


class Advice(BaseModel):
    """What to do, why, what would change it, and where to start."""

    model_config = ConfigDict(frozen=True)

    approaches: list[Approach]
    reasons: list[str]
    would_change: list[str]
    next_command: str


def tuning_reasons(facts: TaskFacts) -> list[str]:
    """What speaks for changing weights."""
    found = []
    if facts.gap in ("behaviour", "both"):
        found.append("The gap is behaviour (style, format, tools), which weights learn and prompts only ask for.")
    if facts.strict_format:
        found.append("Answers must keep a strict format, which a tuned model keeps without being reminded.")
    if facts.latency_ms is not None and facts.latency_ms <= TIGHT_LATENCY_MS:
        found.append(f"{facts.latency_ms} ms leave no room for long instructions and examples in every prompt.")
    if facts.cost_matters:
        found.append("At this volume the tokens of a long prompt cost more than a training run.")
    if facts.few_shot_works is False:
        found.append("Few-shot prompting was tried and is not good enough.")
    return found


def advise(facts: TaskFacts) -> Advice:
    """The rules of thumb, in order: facts belong into retrieval; weights need two reasons and the examples for them."""
    for_tuning = tuning_reasons(facts)
    approaches: list[Approach] = []
    reasons: list[str] = []
    change: list[str] = []
    if facts.gap in ("knowledge", "both") or facts.facts_change in ("monthly", "daily"):
        approaches.append("rag")
        reasons.append(
            "Facts the base does not know, or that change, belong into retrieval: weights cannot be updated daily."
        )
        change.append("If the facts fit into every prompt, paste them in and leave retrieval out.")
    if len(for_tuning) < REASONS_NEEDED or facts.few_shot_works:
        approaches.append("prompting")
        if facts.few_shot_works:
            reasons.append("Few-shot prompting already works; measure before replacing it.")
        else:
            reasons.append(f"{len(for_tuning)} of the {REASONS_NEEDED} reasons that fine-tuning should have are given.")
            reasons += for_tuning
        change.append("A second reason (format, latency, cost, few-shot failing) would speak for fine-tuning.")
    elif facts.examples < FEW:
        approaches.append("prompting")
        reasons += for_tuning
        reasons.append(f"{facts.examples} examples are too few to train on: use the best of them in the prompt.")
        change.append(f"From {FEW} good examples on, compare few-shot with an adapter; from {ENOUGH} on, train.")
    else:
        approaches += ["fine-tuning"] if facts.examples >= ENOUGH else ["prompting", "fine-tuning"]
        reasons += for_tuning
        if facts.examples < ENOUGH:
            reasons.append(f"{facts.examples} examples are in between: try both, and let the same evaluation decide.")
        else:
            reasons.append(f"{facts.examples} examples are enough to train on.")
        change.append("If the few-shot base scores the same in `lorikeet eval`, keep prompting.")
    return Advice(approaches=approaches, reasons=reasons, would_change=change, next_command=_next_command(approaches))


def _next_command(approaches: list[Approach]) -> str:
    if "fine-tuning" in approaches:
        return "lorikeet train configs/train/reuters-topics.yaml   (put your own JSONL under data.train)"
    return "lorikeet status   (then prompt the base model it names over /v1/chat/completions)"
