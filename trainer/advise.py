"""Prompt, retrieve or fine-tune? A decision from facts about a task and what was measured of it, with its reasons. Pure."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FEW = 100  # below: examples go further in the prompt than in weights
ENOUGH = 1_000  # from here on fine-tuning is worth it where there are reasons for it
TIGHT_LATENCY_MS = 500  # long instructions and examples in every prompt cost more time than this leaves
REASONS_NEEDED = 2  # one reason alone is usually met more cheaply
GOOD_ENOUGH = 0.9
CONTEXT_GAIN = 0.1  # a paragraph that helps less is not what was missing
SURE = 0.05  # p below which a difference is taken for one
VALID_ENOUGH = 0.95

Approach = Literal["prompting", "rag", "fine-tuning"]
Kind = Literal["classification", "json", "short text", "long text"]
RungName = Literal["plain", "few-shot", "context"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskFacts(_Frozen):
    """What is known about a task. Everything has a neutral default."""

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
    good_enough: float = Field(GOOD_ENOUGH, gt=0, le=1, description="Share of right answers you would go live with.")


class Rung(_Frozen):
    """One cheap thing that was tried on the served model."""

    name: RungName
    score: float = Field(ge=0, le=1, description="Share of right answers; of long texts: likeness (ROUGE-L).")
    low: float = Field(description="95 % interval.")
    high: float
    valid: float = Field(ge=0, le=1, description="Share of answers in the wanted form.")
    prompt_tokens: float = Field(ge=0, description="Mean; 0 where the server does not tell.")
    p_value: float | None = Field(None, description="Two-sided and paired: this rung against the plain prompt.")


class Evidence(_Frozen):
    """What was measured, all rungs on the same rows."""

    model: str
    data: str
    kind: Kind
    metric: str
    examples: int = Field(description="Rows with distinct prompts in the file.")
    rows: int = Field(description="Rows asked.")
    shots: int
    rungs: tuple[Rung, ...]

    def rung(self, name: RungName) -> Rung | None:
        return next((rung for rung in self.rungs if rung.name == name), None)

    @property
    def prompted(self) -> Rung:
        """The best that prompting reached, without the paragraph."""
        return max((rung for rung in self.rungs if rung.name != "context"), key=lambda rung: rung.score)


class Advice(_Frozen):
    """What to do, why, what would change it, and where to start. facts: those it rests on, what was measured included."""

    approaches: list[Approach]
    reasons: list[str]
    would_change: list[str]
    next_command: str
    facts: TaskFacts
    evidence: Evidence | None = None


def observed(facts: TaskFacts, evidence: Evidence) -> TaskFacts:
    """The facts with what was measured in place of what nobody stated; what was stated stands."""
    found: dict[str, object] = {
        "examples": evidence.examples,
        "strict_format": evidence.kind in ("classification", "json"),
    }
    if evidence.kind != "long text":  # likeness to one wanted text says little about whether an answer will do
        found["few_shot_works"] = evidence.prompted.score >= facts.good_enough
        gap = _gap(evidence, facts.good_enough)
        found |= {"gap": gap} if gap else {}
    stated = facts.model_fields_set
    return facts.model_copy(update={name: value for name, value in found.items() if name not in stated})


def _gap(evidence: Evidence, good_enough: float) -> Literal["knowledge", "behaviour", "both"] | None:
    """None where what was measured does not tell."""
    plain, context, prompted = evidence.rung("plain"), evidence.rung("context"), evidence.prompted
    unruly = prompted.valid < VALID_ENOUGH and prompted.score < good_enough
    if plain is None or context is None:
        return "behaviour" if unruly else None
    helped = context.score - plain.score >= CONTEXT_GAIN and context.p_value is not None and context.p_value < SURE
    if helped and context.score < good_enough:
        return "both" if unruly or context.valid < VALID_ENOUGH else "knowledge"
    if helped:
        return "knowledge"
    return "behaviour" if prompted.score < good_enough else None


def measured_reasons(evidence: Evidence) -> list[str]:
    """What each rung reached, in a sentence."""
    said = []
    names = {"plain": "the plain prompt", "few-shot": f"{evidence.shots} examples", "context": "the right paragraph"}
    for rung in evidence.rungs:
        parts = [f"{names[rung.name]}: {rung.score:.0%} ({rung.low:.0%} to {rung.high:.0%})"]
        if evidence.kind in ("classification", "json"):
            parts.append(f"{rung.valid:.0%} in form")
        if rung.prompt_tokens:
            parts.append(f"{rung.prompt_tokens:.0f} prompt tokens")
        if rung.p_value is not None:
            parts.append(f"p {rung.p_value:.2g} against plain")
        said.append(", ".join(parts))
    return [f"Measured on {evidence.model}, {evidence.metric} of {evidence.rows} rows: {'; '.join(said)}."]


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


def advise(facts: TaskFacts, evidence: Evidence | None = None) -> Advice:
    """The rules of thumb, in order: facts belong into retrieval; weights need two reasons and the examples for them.

    evidence: measured of the task; it fills in the facts that were not stated, and is cited.
    """
    facts = observed(facts, evidence) if evidence is not None else facts
    for_tuning = tuning_reasons(facts)
    approaches: list[Approach] = []
    reasons: list[str] = measured_reasons(evidence) if evidence is not None else []
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
            change.append("Latency or cost that the longer prompt does not allow would speak for fine-tuning.")
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
    change += _open_questions(facts, evidence)
    return Advice(
        approaches=approaches,
        reasons=reasons,
        would_change=change,
        next_command=_next_command(approaches, evidence),
        facts=facts,
        evidence=evidence,
    )


def _open_questions(facts: TaskFacts, evidence: Evidence | None) -> list[str]:
    """What is not known and could change the answer."""
    if evidence is None:
        unknown = facts.few_shot_works is None
        return ["Measure it: give --data with examples and --model; the cheap rungs are then tried."] if unknown else []
    if evidence.rung("context") is None and facts.gap == "none":
        return ["Rows with the right paragraph in a field `context` would tell whether knowledge is what is missing."]
    return []


def _next_command(approaches: list[Approach], evidence: Evidence | None) -> str:
    data = evidence.data if evidence is not None else "rows.jsonl"
    if "fine-tuning" in approaches:
        return f"lorikeet data inspect {data}   (then lorikeet data build, lorikeet estimate, lorikeet train)"
    if approaches == ["prompting"] or approaches[0] == "prompting":
        return "lorikeet status   (then prompt the base model it names over /v1/chat/completions)"
    return "lorikeet status   (then prompt the base model it names with the paragraphs your search finds)"
