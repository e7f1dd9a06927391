"""The parity ladder: how far each form of one fine-tuned model is from base + adapter, a rung at a time, in one report.

PEFT adapter → served adapter → merged → saved and reloaded → quantized → GGUF. A rung is added by whoever made that form; one
outside its limits is not added, so what stands in a report has held, or was accepted with a recorded reason.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import MergeError, ParityError
from adapters.wording import one_line

REPORT_FILE = "merge-report.json"
CARD_FILE = "README.md"
ORDER = ("adapter", "served", "merged", "saved", "quantized", "gguf")  # from the bottom up; others come after, by time
HEADING = "## Parity"


@dataclass(frozen=True)
class Divergence:
    """How far one model is from the reference, over every token after the first of each prompt."""

    max_abs: float  # largest difference of the log-probability of the token that comes next, in nats
    mean_abs: float
    top1: float  # share of positions with the same most likely token
    kl: float | None = None  # Kullback-Leibler divergence of this from the reference, nats a token; None: not seen
    tokens: int = 0  # that were compared
    prompts: int = 0
    stop_rate: float | None = None  # share of prompts whose greedy text ended by itself within the limit
    reference_stop_rate: float | None = None
    same_text: float | None = None  # share of prompts with the reference's greedy text, token for token


class Limits(BaseModel):
    """What a rung may differ by at most; None: no limit. Log-probabilities and KL in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_abs: float | None = None
    mean_abs: float | None = None
    top1: float | None = Field(None, description="Least share of equal first choices.")
    kl: float | None = None
    stop_drop: float | None = Field(
        0.1, description="How much lower than the reference's the stop rate may be; one prompt is always forgiven."
    )


class TaskScore(BaseModel):
    """Share of rows answered exactly, by the reference and by this form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    rows: int
    before: float
    after: float

    def __str__(self) -> str:
        return f"Right answers on {self.rows} rows of {self.source}: {self.before:.1%} before, {self.after:.1%} after"


class Rung(BaseModel):
    """One form of the model, held against the reference on the adapter's goldens and on other prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="adapter, served, merged, saved, quantized or gguf; a second of a kind: 'gguf q8_0'.")
    dtype: str = Field(
        description="In which it was computed, or what it is stored in: float32, bfloat16, w8a8, q4_k_m."
    )
    by: str = Field(description="What ran it: transformers, the gateway's address, llama.cpp …")
    against: str = "base + adapter in float32"
    goldens: Divergence | None = None
    sample: Divergence | None = None
    task: TaskScore | None = None
    limits: Limits = Limits()
    accepted: str = Field("", description="Why it stands although it is outside its limits.")
    note: str = ""
    at: int = Field(default_factory=lambda: int(time.time()), description="Unix seconds.")

    @property
    def faults(self) -> tuple[str, ...]:
        """What is outside the limits, a phrase each."""
        sets = (("goldens", self.goldens), ("sample prompts", self.sample))
        return tuple(
            f"{where}: {fault}" for where, figures in sets if figures is not None for fault in _outside(figures, self)
        )


def judge_rung(rung: Rung) -> None:
    """Raises ParityError with the figures when it is outside its limits and nobody has accepted that."""
    if rung.goldens is None and rung.sample is None:
        raise ParityError(f"Nothing was measured of the rung '{rung.name}'.")
    if rung.faults and not rung.accepted:
        raise ParityError(
            f"{rung.name} ({rung.dtype}) is not {rung.against}, and was not kept: {'; '.join(rung.faults)}."
        )


def add_rung(folder: Path, rung: Rung) -> None:
    """Put it into the folder's report, in place of one of the same name, and into its card. Both whole or not at all.

    A folder without a report gets one that holds the rung alone. Raises ParityError for a rung outside its limits without
    a reason, MergeError for a report that cannot be read; nothing is written then.
    """
    judge_rung(rung)
    report = read_report(folder)
    kept = [each for each in rungs_of(report, folder) if each.name != rung.name]
    rungs = sorted([*kept, rung], key=_height)
    write_report(folder, {**report, "rungs": [each.model_dump(mode="json") for each in rungs]})


def read_report(folder: Path) -> dict[str, Any]:
    """merge-report.json as it stands; empty where there is none. Raises MergeError."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise MergeError(f"{path} cannot be read: {one_line(exc)}.") from exc
    if not isinstance(report, dict):
        raise MergeError(f"{path} is no report of a merge.")
    return report


def read_rungs(folder: Path) -> list[Rung]:
    """From the bottom up. Raises MergeError."""
    return rungs_of(read_report(folder), folder)


def rungs_of(report: dict[str, Any], folder: Path) -> list[Rung]:
    try:
        return [Rung.model_validate(each) for each in report.get("rungs", [])]
    except (ValidationError, TypeError) as exc:
        raise MergeError(f"{folder / REPORT_FILE} holds rungs that cannot be read: {one_line(exc)}.") from exc


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """The report, and its rungs as the last section of the card."""
    rungs = sorted(rungs_of(report, folder), key=_height)
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.name}\n\n"
    before = text.partition(f"{HEADING}\n")[0].rstrip("\n")
    _replace(folder / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    _replace(card, f"{before}\n\n{parity_section(rungs)}")


def parity_section(rungs: list[Rung]) -> str:
    """Markdown: a row for each rung and set of prompts, and what was accepted or is to be known of them."""
    lines = [
        HEADING,
        "",
        "Differences of natural log-probabilities; KL in nats a token; stopped: greedy texts that ended by themselves (in "
        "brackets the reference's, where they are others).",
        "",
        "| form | on | largest | mean | same first choice | KL | stopped | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(cells)} |" for rung in rungs for cells in rung_rows(rung)]
    lines += [
        "",
        *(f"- {rung.name}: against {rung.against}, by {rung.by}." + _remarks(rung) for rung in rungs),
        "",
    ]
    return "\n".join(lines)


def rung_rows(rung: Rung) -> Iterator[tuple[str, ...]]:
    """The cells of a table: form, prompts, largest, mean, first choices, KL, stop rate, equal texts."""
    for where, figures in (("goldens", rung.goldens), ("sample", rung.sample)):
        if figures is not None:
            yield (
                f"{rung.name}, {rung.dtype}",
                where,
                f"{figures.max_abs:.2e}",
                f"{figures.mean_abs:.2e}",
                f"{figures.top1:.1%}",
                "" if figures.kl is None else f"{figures.kl:.1e}",
                _stopped(figures),
                "" if figures.same_text is None else f"{figures.same_text:.0%}",
            )


def _stopped(figures: Divergence) -> str:
    if figures.stop_rate is None:
        return ""
    other = figures.reference_stop_rate
    return f"{figures.stop_rate:.0%}" + ("" if other in (None, figures.stop_rate) else f" ({other:.0%})")


def _remarks(rung: Rung) -> str:
    accepted = f" Outside its limits ({'; '.join(rung.faults)}), accepted: {rung.accepted}." if rung.accepted else ""
    task = f" {rung.task}." if rung.task else ""
    return f"{accepted}{task} {rung.note}".rstrip()


def _outside(figures: Divergence, rung: Rung) -> Iterator[str]:
    limits = rung.limits
    # Written so that NaN fails.
    if limits.max_abs is not None and not figures.max_abs <= limits.max_abs:
        yield f"a log-probability is off by {figures.max_abs:.2g} (limit {limits.max_abs:g})"
    if limits.mean_abs is not None and not figures.mean_abs <= limits.mean_abs:
        yield f"log-probabilities are off by {figures.mean_abs:.2g} on average (limit {limits.mean_abs:.2g})"
    if limits.top1 is not None and not figures.top1 >= limits.top1:
        yield f"only {figures.top1:.1%} of the first choices are equal (limit {limits.top1:.1%})"
    if limits.kl is not None and figures.kl is not None and not figures.kl <= limits.kl:
        yield f"KL is {figures.kl:.2g} nats a token (limit {limits.kl:.2g})"
    if limits.stop_drop is not None and figures.stop_rate is not None and figures.reference_stop_rate is not None:
        drop = figures.reference_stop_rate - figures.stop_rate
        if not drop <= max(limits.stop_drop, 1 / max(figures.prompts, 1)) + 1e-9:
            yield (
                f"only {figures.stop_rate:.0%} of the greedy texts end by themselves, {figures.reference_stop_rate:.0%} "
                "of the reference's do"
            )


def _height(rung: Rung) -> tuple[int, int, str]:
    kind = rung.name.split()[0]
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), rung.at, rung.name)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
