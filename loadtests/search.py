"""The highest arrival rate at which every objective holds: doubling, then halving the interval. The decisions are pure.

A probe is a whole load test at one rate. Its verdict moves the search only when it is clear; what cannot be decided is said
to be unresolved, with the reason, instead of a number that nothing supports.
"""

import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests.loads import Poisson
from loadtests.record import Run
from loadtests.scenario import Scenario
from loadtests.slo import Verdict
from loadtests.summary import Summary

RESULT = "search.json"
TRIES = 2  # of a rate that was undecided


@dataclass(frozen=True)
class Limits:
    """Where to look. Rates are arrivals per second."""

    start: float
    lowest: float
    highest: float
    precision: float  # ends when the missed rate is at most this share above the passed one


@dataclass(frozen=True)
class Probe:
    """What one rate came to."""

    rate_per_s: float
    verdict: Verdict
    good_per_s: float = 0.0
    reasons: tuple[str, ...] = ()
    wrong: bool = False  # an answer belonged to somebody else: nothing that a lower rate would mend
    interrupted: bool = False


@dataclass(frozen=True)
class Outcome:
    """The end of a search. resolved: between `passed` and `missed` lies the highest rate that holds.

    exit_code: 0 resolved, 1 not even the lowest rate holds, or an answer was wrong, 3 unresolved, 4 void.
    """

    resolved: bool
    passed: Probe | None
    missed: Probe | None
    reason: str
    exit_code: int


def next_step(probes: Sequence[Probe], limits: Limits) -> float | Outcome:
    """The rate to probe next, or how it ends."""
    if not probes:
        return limits.start
    passed = max((p for p in probes if p.verdict is Verdict.PASS), key=lambda p: p.rate_per_s, default=None)
    missed = min((p for p in probes if p.verdict is Verdict.MISSED), key=lambda p: p.rate_per_s, default=None)

    def unresolved(reason: str, exit_code: int = 3) -> Outcome:
        return Outcome(False, passed, missed, reason, exit_code)

    last = probes[-1]
    if last.wrong:
        return unresolved(f"at {last.rate_per_s:g}/s {last.reasons[0]}", 1)
    if last.interrupted:
        return unresolved(f"interrupted at {last.rate_per_s:g}/s")
    if last.verdict is Verdict.VOID:
        return unresolved(f"the load generator could not keep up at {last.rate_per_s:g}/s", 4)
    if last.verdict is Verdict.UNDECIDED:
        if sum(probe.rate_per_s == last.rate_per_s for probe in probes) < TRIES:
            return last.rate_per_s
        return unresolved(f"{last.rate_per_s:g}/s stayed undecided: {'; '.join(last.reasons[:1])}")
    if passed and missed and passed.rate_per_s >= missed.rate_per_s:
        return unresolved(f"{passed.rate_per_s:g}/s held although {missed.rate_per_s:g}/s did not")
    if passed is None:
        assert missed is not None  # noqa: S101  a clear verdict is one or the other
        if missed.rate_per_s <= limits.lowest:
            return unresolved(f"not even {missed.rate_per_s:g}/s holds", 1)
        return max(limits.lowest, missed.rate_per_s / 2)
    if missed is None:
        if passed.rate_per_s >= limits.highest:
            return unresolved(f"at least {passed.rate_per_s:g}/s: nothing was missed up to the highest rate allowed")
        return min(limits.highest, passed.rate_per_s * 2)
    if missed.rate_per_s <= passed.rate_per_s * (1 + limits.precision):
        return Outcome(True, passed, missed, f"between {passed.rate_per_s:.3g}/s and {missed.rate_per_s:.3g}/s", 0)
    return math.sqrt(passed.rate_per_s * missed.rate_per_s)


def at_rate(scenario: Scenario, rate_per_s: float, number: int) -> Scenario:
    """The scenario with Poisson arrivals at the rate, in its own phases; each probe asks and arrives differently."""
    load = Poisson(rate_per_s=rate_per_s)
    phases = [phase.model_copy(update={"load": None}) for phase in scenario.phases]
    return scenario.model_copy(update={"load": load, "phases": phases, "seed": scenario.seed + number})


async def search(
    limits: Limits,
    measure: Callable[[float, int], Awaitable[tuple[Run, Summary]]],
    *,
    done: Callable[[Probe], None] = lambda _: None,
) -> tuple[list[Probe], Outcome]:
    """measure: runs a rate's load test; its second argument is the probe's number, from 1."""
    probes: list[Probe] = []
    while not isinstance(step := next_step(probes, limits), Outcome):
        run, summary = await measure(step, len(probes) + 1)
        good_per_s, wrong = summary.overall.good_per_s, bool(summary.wrong)
        probes.append(Probe(step, summary.verdict, good_per_s, summary.reasons, wrong, run.interrupted))
        done(probes[-1])
    return probes, step


def save(folder: Path, limits: Limits, probes: Sequence[Probe], outcome: Outcome) -> dict[str, Any]:
    """Write search.json; what it holds."""
    document = {
        "format": "lorikeet.loadtest.search",
        "version": 1,
        "limits": asdict(limits),
        "probes": [asdict(probe) for probe in probes],
        "outcome": asdict(outcome),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return document
