"""From what a build counted and decided to its account, with what a person should look at."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.licences import Verdict
from trainer.data.account import (
    Account,
    AgreementAccount,
    BenchmarkAccount,
    Classes,
    Duplicates,
    LeakProof,
    Lengths,
    Mix,
    Privacy,
    SourceAccount,
    StepAccount,
    lengths,
)
from trainer.data.agreement import Pair, agreement
from trainer.data.balance import distance, shares
from trainer.data.card import Dataset
from trainer.data.contamination import Benchmark
from trainer.data.origins import Origin
from trainer.data.production import Production
from trainer.data.recipe import BuildConfig
from trainer.data.refine import STEPS
from trainer.data.selection import Roles, Selection, count_classes
from trainer.data.store import Ids
from trainer.data.tally import Tally
from trainer.errors import ConfigError

USUAL_SHARE = (0.1, 0.3)  # of general data
CROWDED_SHARE = 0.2  # of all rows in one group: then prompts probably share a form
FEW_EVAL_ROWS = 50


@dataclass(frozen=True)
class Outcome:
    """Everything a build knows when its files are written and proven. chars, labels: [rows]."""

    config: BuildConfig
    origins: Sequence[Origin]
    kept: Mapping[int, int]  # by source
    benchmarks: Sequence[Benchmark]
    production: Production | None
    verdict: Verdict
    tally: Tally
    roles: Roles
    selection: Selection
    train: Ids
    held_out: Ids
    chars: NDArray[np.uint32]
    labels: NDArray[np.uint16]
    class_names: Sequence[str]
    compared: int
    dataset: Dataset
    proof: LeakProof


def make_account(outcome: Outcome) -> Account:
    """Raises ConfigError where the configuration asks for an agreement of fields that no row has."""
    tally, config = outcome.tally, outcome.config
    steps = step_accounts(tally.rows, tally.reasons)
    rejected = {step.name: step.rejected for step in steps}
    classes, agreed, mix = _classes(outcome), _agreement(outcome), _mix(outcome)
    return Account(
        dataset=outcome.dataset,
        sources=tuple(_sources(outcome)),
        steps=steps,
        read=sum(tally.read.values()),
        pieces=tally.pieces,
        normalised=tally.normalised,
        rejected=sum(tally.reasons.values()),
        lengths=_lengths(outcome),
        classes=classes,
        duplicates=Duplicates(
            exact=rejected["exact duplicates"],
            near=rejected["near duplicates"],
            similarity=config.duplicates.similarity,
            same_prompt_groups=outcome.selection.groups,
            largest_group=outcome.selection.largest_group,
            compared=outcome.compared,
        ),
        privacy=Privacy(
            action=config.privacy.action, rows=tally.personal_rows, found=dict(sorted(tally.personal.items()))
        ),
        contamination=tuple(
            BenchmarkAccount(name=each.name, rows=each.rows, contaminated=tally.contaminated[each.name])
            for each in outcome.benchmarks
        ),
        leak_proof=outcome.proof,
        agreement=agreed,
        mix=mix,
        licences=outcome.verdict,
        allow_licence=config.allow_licence,
        warnings=tuple(_warnings(outcome, classes, agreed, mix)),
    )


def role_of(config: BuildConfig, source: int) -> str:
    """What the source at this place of config.all_sources is read for."""
    if source < len(config.evaluation):
        return "evaluation"
    return "train" if source < len(config.evaluation) + len(config.sources) else "general"


def step_accounts(rows: int, reasons: Mapping[tuple[str, str], int]) -> tuple[StepAccount, ...]:
    """The steps in their order: rows that came to each, and why some went no further."""
    steps: list[StepAccount] = []
    for name in STEPS:
        own = {reason: count for (step, reason), count in sorted(reasons.items()) if step == name}
        steps.append(StepAccount(name=name, before=rows, rejected=sum(own.values()), reasons=own))
        rows -= steps[-1].rejected
    return tuple(steps)


def _sources(outcome: Outcome) -> Iterator[SourceAccount]:
    for place, origin in enumerate(outcome.origins):
        yield SourceAccount(
            name=origin.config.title,
            role=role_of(outcome.config, place),
            licence=origin.licence,
            files=len(origin.files),
            read=outcome.tally.read[place],
            kept=outcome.kept.get(place, 0),
        )


def _lengths(outcome: Outcome) -> dict[str, Lengths]:
    told = {"train": lengths(outcome.chars[outcome.train]), "eval": lengths(outcome.chars[outcome.held_out])}
    if outcome.production is not None and outcome.production.lengths is not None:
        told["production"] = outcome.production.lengths
    return told


def _classes(outcome: Outcome) -> Classes | None:
    """Of the rows that are no general data."""
    if not outcome.class_names:
        return None
    own = outcome.train[outcome.roles.own[outcome.train]]
    train = count_classes(outcome.labels[own], outcome.class_names)
    held_out = count_classes(outcome.labels[outcome.held_out], outcome.class_names)
    told = Classes(train=_rounded(train), eval=_rounded(held_out))
    if outcome.production is None or outcome.config.balance is None:
        return told
    production = outcome.production.classes
    return told.model_copy(
        update={
            "production": _rounded(production),
            "before": round(distance(outcome.selection.classes_before or {}, production), 4),
            "distance": round(distance(train, production), 4),
            "tolerance": outcome.config.balance.tolerance,
        }
    )


def _agreement(outcome: Outcome) -> tuple[AgreementAccount, ...]:
    if outcome.config.agreement is None:
        return ()
    by_pair: dict[Pair, dict[Pair, int]] = {}
    for (annotators, labels), count in outcome.tally.agreed.items():
        by_pair.setdefault(annotators, {})[labels] = count
    if not by_pair:
        raise ConfigError(f"agreement: no row has two of the fields {', '.join(outcome.config.agreement.fields)}.")
    measured = [agreement(annotators, counts) for annotators, counts in sorted(by_pair.items())]
    return tuple(
        AgreementAccount(
            annotators=each.annotators,
            rows=each.rows,
            raw=round(each.raw, 4),
            kappa=None if each.kappa is None else round(each.kappa, 4),
        )
        for each in measured
    )


def _mix(outcome: Outcome) -> Mix | None:
    if outcome.config.general is None:
        return None
    rows = int(outcome.roles.general[outcome.train].sum())
    return Mix(wanted=outcome.config.general.share, share=round(rows / len(outcome.train), 4), rows=rows)


def _rounded(counts: Mapping[str, float]) -> dict[str, float]:
    ordered = sorted(shares(counts).items(), key=lambda item: (-item[1], item[0]))
    return {name: round(share, 4) for name, share in ordered}


def _warnings(
    outcome: Outcome, classes: Classes | None, agreed: Sequence[AgreementAccount], mix: Mix | None
) -> Iterator[str]:
    config, selection = outcome.config, outcome.selection
    if outcome.verdict.level == "block":
        yield f"The licences block this data set. It was built because: {config.allow_licence}"
    for finding in outcome.verdict.findings:
        if finding.level != "ok":
            yield f"Licence of {finding.source} ({finding.licence}): {finding.what}"
    if classes is not None and classes.distance is not None and classes.distance > (classes.tolerance or 0):
        yield (
            f"Classes are {classes.distance:.0%} away from production's, {classes.tolerance:.0%} is allowed. "
            "Add rows of the rare ones, or set balance.action: resample."
        )
    for pair in agreed:
        if config.agreement is not None and pair.raw < config.agreement.warn_below:
            yield (
                f"{' and '.join(pair.annotators)} agree on {pair.raw:.1%} of {pair.rows} rows, less than "
                f"{config.agreement.warn_below:.0%}. What they disagree on cannot be learned: settle it first."
            )
    if mix is not None and mix.share < mix.wanted - 0.01:
        yield f"General data is {mix.share:.1%} of the training rows, not {mix.wanted:.0%}: its sources have too few rows."
    if mix is not None and not USUAL_SHARE[0] <= mix.wanted <= USUAL_SHARE[1]:
        yield f"A share of {mix.wanted:.0%} general data was asked for; 10 to 30 % is usual."
    if selection.largest_group > max(10, CROWDED_SHARE * len(outcome.train)):
        yield (
            f"{selection.largest_group} rows have prompts that are alike. If what they share is an instruction, "
            "make it the system message."
        )
    if len(outcome.held_out) < FEW_EVAL_ROWS:
        yield f"Only {len(outcome.held_out)} evaluation rows: differences of ten points are within chance."
