"""How long it took, after something was done to the server, until its answers were ok again. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.record import Mark, Outcome, PhaseWindow, Record

STEADY = 5  # ok answers in a row after the last failure: one or two may be luck between failures
FAILURES = (Outcome.FAILED, Outcome.REFUSED, Outcome.CENSORED)


@dataclass(frozen=True)
class Recovery:
    mark: Mark
    phase: str
    failed: int  # requests that failed after it
    after_s: float | None  # None: nothing failed, or it was not ok again before the run ended


def recoveries(marks: Sequence[Mark], windows: Sequence[PhaseWindow], records: Sequence[Record]) -> list[Recovery]:
    """Of each mark, by its start: from its start to the intended start of the first of STEADY requests in a row, in order
    of intended start, that were all answered ok; they follow the last request that failed because of it.

    A request that failed, was refused, was cut off, or got somebody else's answer is put down to the latest mark that had
    begun when it ended, if it was meant to start before that mark's phase was over. What we cancelled counts as neither.
    """
    marks = sorted(marks, key=lambda mark: mark.start_s)
    asked = sorted((r for r in records if r.outcome is not Outcome.CANCELLED), key=lambda r: r.intended_s)
    failed = [record.outcome in FAILURES or bool(record.wrong) for record in asked]
    blamed = [_latest(marks, record) if bad else None for record, bad in zip(asked, failed, strict=True)]
    found = []
    for number, mark in enumerate(marks):
        window = next((w for w in reversed(windows) if w.start_s <= mark.start_s), None)
        until_s = window.end_s if window else mark.end_s
        own = [i for i, blame in enumerate(blamed) if blame == number and asked[i].intended_s < until_s]
        after_s = None
        if own:
            later = range(own[-1] + 1, len(asked) - STEADY + 1)
            again = (i for i in later if asked[i].intended_s >= mark.start_s and not any(failed[i : i + STEADY]))
            after_s = next((asked[i].intended_s - mark.start_s for i in again), None)
        found.append(Recovery(mark, window.name if window else "", len(own), after_s))
    return found


def _latest(marks: Sequence[Mark], record: Record) -> int | None:
    """marks: by their start."""
    begun = [i for i, mark in enumerate(marks) if record.end_s is None or mark.start_s <= record.end_s]
    return begun[-1] if begun else None
