"""Is run B slower than run A? The ratio of their P95s, with an interval that knows of queues. Pure.

Requests near each other in time share a queue, so taking them as independent makes intervals too narrow. The moving-block
bootstrap (Künsch 1989) draws stretches of consecutive requests instead. Where both runs had the same schedule, both are
drawn at the same requests: what the schedule itself did to the P95 (a burst, a long prompt) is in both and cancels.

Two equal simulated queues, 2000 requests, 150 times: the lower bound was above 1 in 1 % of them at 60 % utilisation and
in 7 % at 80 % (2.5 % is the aim); of single requests drawn independently in 13 % and 35 %.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.errors import LoadTestError
from loadtests.groups import adapter_names
from loadtests.record import METRICS, ONE_A_REQUEST, Outcome, Record, Run
from loadtests.slo import Verdict, verdict_of
from loadtests.stats import CONFIDENCE, RESAMPLES, Estimate, nearest_rank, percentile_of, rank_of
from loadtests.summary import EXIT_CODES, scenario_of

FORMAT = "lorikeet.loadtest.comparison"
VERSION = 1
PERCENT = 95.0
COMPARED = ("ttft", "e2e")
BLOCK_S = 5.0  # of requests: longer than a queue remembers a stall of one or two seconds
MIN_BLOCKS = 10  # with fewer, resamples are all alike and the interval says nothing
SHARED = 0.9  # of the smaller run's requests must be in the other, or these are different schedules
SAME_INSTANT_S = 1e-3
FEWER_ANSWERS = 0.01  # a success rate lower by more decides nothing: percentiles are of the answers that came
VALUES_AT_ONCE = 2_000_000  # bounds the memory of the resamples


@dataclass(frozen=True)
class Row:
    """One metric, of all requests or of one adapter's."""

    metric: str
    adapter: str | None
    samples: int  # pairs, or answers of the run with fewer
    a_s: float | None  # P95
    b_s: float | None
    ratio: Estimate | None  # B / A
    smallest_effect: float | None
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    paired: bool
    unpaired_because: str
    margin: float  # B may be slower by this share
    rows: tuple[Row, ...]
    verdict: Verdict
    notes: tuple[str, ...]  # what else a reader must know
    wrong: bool  # B has answers that belonged to somebody else
    fewer_answers: bool  # B has clearly fewer of them than A

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def compare(
    a: Run, b: Run, *, metrics: Sequence[str] = (), margin: float = 0.05, per_adapter: bool = False
) -> Comparison:
    """B is slower where the lower bound of the ratio's 95 % interval is above 1 + margin: missed, as with wrong answers.

    metrics: COMPARED where none is given, as far as the runs have them. Undecided: too few samples for the larger
    sample_floor of both scenarios, or not slower but with fewer answers, as who drops the slow ones looks fast.
    Raises LoadTestError for a metric that has not one value a request.
    """
    for metric in metrics:
        if metric not in ONE_A_REQUEST:
            raise LoadTestError(f"Nothing to compare by the metric '{metric}'. There are {', '.join(ONE_A_REQUEST)}.")
    floor = max(scenario_of(run).sample_floor for run in (a, b))
    before, after = _measured(a), _measured(b)
    same_requests = a.scenario.get("requests") == b.scenario.get("requests")
    unpaired_because = _difference(before, after) if same_requests else "the scenarios ask for other requests"
    answered = _answered_share(before), _answered_share(after)
    fewer = answered[1] < answered[0] - FEWER_ANSWERS
    paired = not unpaired_because
    if paired:
        before, after = _pairs(before, after)
    measured_s = min(sum(w.end_s - w.start_s for w in run.windows if w.measured) for run in (a, b))
    names = adapter_names((*a.records, *b.records))
    adapters = sorted({names[record.tenant, record.adapter] for record in (*before, *after)}) if per_adapter else []
    rows = []
    for metric in metrics or [name for name in COMPARED if _has(before, name) or _has(after, name)]:
        for adapter in (None, *adapters):
            one, other = (_values(some, metric, adapter, names) for some in (before, after))
            present, also = ~np.isnan(one), ~np.isnan(other)
            if paired:
                present = also = present & also
            figures = one[present], other[also]
            rows.append(
                _row(metric, adapter, *figures, paired=paired, measured_s=measured_s, margin=margin, sample_floor=floor)
            )
    wrong = any(record.wrong for record in b.records)
    notes = [*_notes(a, b)]
    if fewer:
        notes.append(
            f"B answered {answered[1]:.1%} of its requests, A {answered[0]:.1%}: only answers that came are compared"
        )
    return Comparison(
        paired=paired,
        unpaired_because=unpaired_because,
        margin=margin,
        rows=tuple(rows),
        verdict=verdict_of(
            [*(row.verdict for row in rows), *([Verdict.UNDECIDED] if fewer else [])],
            wrong=wrong,
            healthy=not a.health.faults and not b.health.faults,
            interrupted=False,
        ),
        notes=tuple(notes),
        wrong=wrong,
        fewer_answers=fewer,
    )


def _row(
    metric: str,
    adapter: str | None,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    *,
    paired: bool,
    measured_s: float,
    margin: float,
    sample_floor: int,
) -> Row:
    """a, b: values in seconds, by intended start; of the same requests when paired."""
    samples = min(len(a), len(b))
    if not samples:
        return Row(metric, adapter, 0, None, None, None, None, Verdict.UNDECIDED, "no answers to compare")
    a_s, b_s = percentile_of(a, PERCENT), percentile_of(b, PERCENT)

    def row(verdict: Verdict, note: str = "", ratio: Estimate | None = None, effect: float | None = None) -> Row:
        return Row(metric, adapter, samples, a_s, b_s, ratio, effect, verdict, note)

    if samples < sample_floor:
        return row(Verdict.UNDECIDED, f"{samples} of {sample_floor} samples needed")
    ratio = p95_ratio(a, b, paired=paired, measured_s=measured_s)
    if ratio is None:
        return row(Verdict.UNDECIDED, "a P95 of 0 has no ratio")
    verdict = Verdict.MISSED if ratio.low > 1 + margin else Verdict.PASS
    return row(verdict, ratio=ratio, effect=smallest_effect(ratio, margin))


def smallest_effect(ratio: Estimate, margin: float = 0.0) -> float:
    """The ratio beyond which the lower bound would have been above 1 + margin, had resamples spread as these did.

    They spread by a factor: value / low. Where few slow requests make the spread lopsided, with the value near its lower
    end, half of the whole spread counts, √(high / low). A P95 that is worse by less would have gone unseen.
    """
    return (1 + margin) * max(ratio.value / ratio.low, math.sqrt(ratio.high / ratio.low))


def p95_ratio(
    a: NDArray[np.float64], b: NDArray[np.float64], *, paired: bool, measured_s: float, seed: int = 0
) -> Estimate | None:
    """P95 of b over P95 of a, with the interval of a moving-block bootstrap. None when a P95 is 0, or drawn as 0.

    a, b: not empty, in the order of time; of equal length and drawn at the same places when paired.
    """
    rng = np.random.default_rng(seed)
    if paired:
        a_draws, b_draws = _p95_draws([a, b], block_length(len(a), measured_s), rng)
    else:
        ((a_draws,), (b_draws,)) = (_p95_draws([one], block_length(len(one), measured_s), rng) for one in (a, b))
    if not a_draws.min() > 0 or not b_draws.min() > 0:
        return None
    ratios = np.sort(b_draws / a_draws)
    tail = 100 * (1 - CONFIDENCE) / 2
    value = percentile_of(b, PERCENT) / percentile_of(a, PERCENT)
    return Estimate(value, nearest_rank(ratios, tail), nearest_rank(ratios, 100 - tail))


def block_length(count: int, measured_s: float) -> int:
    """Requests in a block: those of BLOCK_S, at least count ** (1/3), and so few that there are MIN_BLOCKS.

    The cube root is the rate at which blocks must grow with the sample (Hall, Horowitz, Jing 1995).
    """
    in_time = count * BLOCK_S / max(measured_s, BLOCK_S)
    return max(1, min(math.ceil(max(in_time, math.cbrt(count))), count // MIN_BLOCKS))


def _p95_draws(
    columns: Sequence[NDArray[np.float64]], block: int, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Of each column the P95 of RESAMPLES resamples, drawn at the same places in all. columns: of equal length."""
    count = len(columns[0])
    rank = rank_of(PERCENT, count)
    at_once = max(1, VALUES_AT_ONCE // count)
    draws = np.empty((len(columns), RESAMPLES))
    for first in range(0, RESAMPLES, at_once):
        some = slice(first, min(first + at_once, RESAMPLES))
        starts = rng.integers(0, count - block + 1, size=(some.stop - some.start, math.ceil(count / block), 1))
        places = (starts + np.arange(block)).reshape(len(starts), -1)[:, :count]
        for column, found in zip(columns, draws, strict=True):
            found[some] = np.partition(column[places], rank - 1, axis=1)[:, rank - 1]
    return list(draws)


def _measured(run: Run) -> list[Record]:
    """By intended start."""
    names = {window.name for window in run.windows if window.measured}
    return sorted((record for record in run.records if record.phase in names), key=lambda record: record.intended_s)


def _difference(before: Sequence[Record], after: Sequence[Record]) -> str:
    """Why the runs cannot be paired; empty when they had the same schedule."""
    others = {record.id: record for record in after}
    shared = [(record, others[record.id]) for record in before if record.id in others]
    if len(shared) < SHARED * min(len(before), len(after)) or not shared:
        return f"only {len(shared)} of the requests are in both runs"
    if any((a.tenant, a.adapter, a.stream) != (b.tenant, b.adapter, b.stream) for a, b in shared):
        return "requests of the same id went to other adapters or tenants"
    # when a conversation goes on is up to the answer before
    if any(a.turn <= 1 and abs(a.intended_s - b.intended_s) > SAME_INSTANT_S for a, b in shared):
        return "the same requests were sent at other instants, as in a closed loop"
    return ""


def _pairs(before: Sequence[Record], after: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    others = {record.id: record for record in after}
    shared = [record for record in before if record.id in others]
    return shared, [others[record.id] for record in shared]


def _values(
    records: Sequence[Record], metric: str, adapter: str | None, names: Mapping[tuple[str, str], str]
) -> NDArray[np.float64]:
    """One a record of the adapter, as `names` calls it by tenant and name; NaN where it has none."""
    return np.array(
        [
            value[0] if record.outcome is Outcome.OK and (value := METRICS[metric](record)) else math.nan
            for record in records
            if adapter in (None, names[record.tenant, record.adapter])
        ]
    )


def _answered_share(records: Sequence[Record]) -> float:
    judged = [record for record in records if record.outcome is not Outcome.CANCELLED]
    return sum(record.outcome is Outcome.OK for record in judged) / len(judged) if judged else 0.0


def _has(records: Sequence[Record], metric: str) -> bool:
    return any(METRICS[metric](record) for record in records if record.outcome is Outcome.OK)


def _notes(a: Run, b: Run) -> Iterator[str]:
    for name, run in (("A", a), ("B", b)):
        yield from (f"{name} is void: {fault}" for fault in run.health.faults)
        if run.interrupted:
            yield f"{name} was interrupted before its end"
        if wrong := sum(bool(record.wrong) for record in run.records):
            yield f"{name} has {wrong} answers that belonged to somebody else"


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """What `compare --json` prints; seconds throughout."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "verdict": comparison.verdict.value,
        "exit_code": comparison.exit_code,
        "paired": comparison.paired,
        "unpaired_because": comparison.unpaired_because,
        "margin": comparison.margin,
        "percentile": PERCENT,
        "rows": [asdict(row) for row in comparison.rows],
        "notes": list(comparison.notes),
    }
