"""The requests of a run in groups: what became of each group's requests, how long they took, how many were good. Pure."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from loadtests.record import METRICS, Outcome, PhaseWindow, Record
from loadtests.stats import PERCENTILES, Distribution, describe

Limits = Mapping[str, float]  # metric to the most it may be, in seconds


def is_good(record: Record, limits: Limits) -> bool:
    """Complete, not somebody else's answer, and every figure it has within its limit."""
    return (
        record.outcome is Outcome.OK
        and not record.wrong
        and all(value <= limit for metric, limit in limits.items() for value in METRICS[metric](record))
    )


@dataclass(frozen=True)
class Fairness:
    """Jain's index, between how many, and the requests of the one with fewest."""

    index: float
    parties: int
    fewest: int


def jain(shares: Sequence[float]) -> float | None:
    """(Σx)² / (n Σx²)  (Jain, Chiu, Hawe 1984, DEC-TR-301): 1 when all x are equal, 1/n when one has all.

    shares: what each got, as a share of what it asked for: good answers / requests the server is answerable for. So a
    busy tenant is not "favoured" by asking more, nor one that is refused half "equal" to one that asked half as much.
    None when nobody got anything, or there are not two to compare: 0/0 is no fairness.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares and len(shares) > 1 else None


@dataclass(frozen=True)
class Group:
    """Some of the requests of the measured phases."""

    kind: str  # overall, adapter, tenant, phase, temperature (warm, cold), visit (first, again, after_eviction)
    name: str
    outcomes: Mapping[str, int]
    metrics: Mapping[str, Distribution]  # of the ok ones, ranked below those that were cut off
    refusal: Distribution | None  # sent to refused: latency of the 429 itself
    per_s: float  # ok answers that ended within the measured time, per second of it; so with all rates
    output_tokens_per_s: float
    good: int  # answers within the goodput limits
    good_per_s: float
    wrong: int  # answers that were another adapter's or another tenant's
    fairness: Mapping[str, Fairness]  # between tenants, between adapters; of the overall group and of phases

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    @property
    def judged(self) -> int:
        """Requests the server is answerable for: not those we gave up."""
        return self.count - self.outcomes.get(Outcome.CANCELLED, 0)

    def share_of(self, outcome: Outcome) -> float:
        return self.outcomes.get(outcome, 0) / self.judged if self.judged else 0.0

    @property
    def success_rate(self) -> float:
        return self.share_of(Outcome.OK)

    @property
    def goodput(self) -> float:
        """Share of the judged requests that are good."""
        return self.good / self.judged if self.judged else 0.0

    @property
    def is_lower_bound(self) -> bool:
        """So many requests were cut off that some percentile only says `at least`."""
        return any(d.is_lower_bound(percent) for d in self.metrics.values() for percent in d.percentiles)


def _temperature(record: Record) -> str:
    return "" if record.load_s is None else "cold" if record.load_s > 0 else "warm"


def adapter_names(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Of each tenant and adapter asked for, its name in the run: tenant/adapter where several tenants use the name.

    A bare name is the caller's own adapter, so these are different ones.
    """
    asked = {(record.tenant, record.adapter) for record in records}
    tenants = Counter(adapter for _, adapter in asked)
    return {
        (tenant, adapter): f"{tenant}/{adapter}" if tenants[adapter] > 1 and "/" not in adapter else adapter
        for tenant, adapter in asked
    }


def labels_of(records: Iterable[Record]) -> dict[str, Callable[[Record], str]]:
    """Of each kind of group, which of them a record belongs to; empty: none. records: of the whole run."""
    names = adapter_names(records)
    return {
        "adapter": lambda record: names[record.tenant, record.adapter],
        "tenant": lambda record: record.tenant,
        "phase": lambda record: record.phase,
        "temperature": _temperature,  # whether the adapter had to be loaded first, as the gateway reports
        "visit": lambda record: record.visit,
    }


class Columns:
    """The records of a run as columns, made once for all of its groups."""

    def __init__(self, records: Sequence[Record], limits: Mapping[str, Limits] | None = None) -> None:
        """limits: of each phase, what a good answer keeps to."""
        limits = limits or {}
        self.records = records
        self.good = np.array([is_good(record, limits.get(record.phase, {})) for record in records], dtype=bool)
        self.judged = np.array([record.outcome is not Outcome.CANCELLED for record in records], dtype=bool)
        labels = labels_of(records)
        self.labels = {kind: np.array([of(record) for record in records], dtype=str) for kind, of in labels.items()}
        self._end_s = np.array([np.nan if record.end_s is None else record.end_s for record in records])
        done = [i for i, record in enumerate(records) if record.outcome is Outcome.OK]
        self._metrics: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for metric, of in METRICS.items():
            figures = [of(records[i]) for i in done]
            owners = np.repeat(np.array(done, dtype=np.int64), [len(some) for some in figures])
            self._metrics[metric] = owners, np.fromiter(chain.from_iterable(figures), np.float64, len(owners))

    def metrics(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Of each metric, the values of the ok answers among the chosen."""
        for metric, (owners, values) in self._metrics.items():
            yield metric, values[chosen[owners]]

    def ended_in(self, windows: Iterable[PhaseWindow]) -> NDArray[np.bool_]:
        ended = np.zeros(len(self.records), dtype=bool)
        for window in windows:
            ended |= (window.start_s <= self._end_s) & (self._end_s <= window.end_s)
        return ended

    def fairness(self, kind: str, chosen: NDArray[np.bool_]) -> Fairness | None:
        asking = chosen & self.judged
        names, party = np.unique(self.labels[kind][asking], return_inverse=True)
        asked = np.bincount(party, minlength=len(names))
        got = np.bincount(party, weights=self.good[asking], minlength=len(names))
        index = jain((got / asked).tolist())
        return None if index is None else Fairness(index, len(names), int(asked.min()))


ORDER = {"temperature": ("warm", "cold"), "visit": ("first", "again", "after_eviction")}


def groups(
    columns: Columns, windows: Sequence[PhaseWindow], *, seed: int, percentiles: Sequence[float] = PERCENTILES
) -> list[Group]:
    """Overall, each adapter (busiest first), each tenant, each phase, warm and cold, each visit; of measured phases only."""
    measured = {window.name: window for window in windows if window.measured}
    inside = np.isin(columns.labels["phase"], list(measured))

    def group(kind: str, name: str, chosen: NDArray[np.bool_], windows: Collection[PhaseWindow]) -> Group:
        some = [columns.records[i] for i in np.flatnonzero(chosen)]
        refused = [
            r.end_s - r.sent_s for r in some if r.outcome is Outcome.REFUSED and r.end_s and r.sent_s is not None
        ]
        outcomes = Counter(record.outcome.value for record in some)
        described = {
            metric: describe(values, seed, percentiles, cut_off=outcomes[Outcome.CENSORED])
            for metric, values in columns.metrics(chosen)
        }
        in_time = chosen & columns.ended_in(windows)
        done = [columns.records[i] for i in np.flatnonzero(in_time) if columns.records[i].outcome is Outcome.OK]
        measured_s = sum(window.end_s - window.start_s for window in windows)
        between = ("tenant", "adapter") if kind in ("overall", "phase") else ()
        fairness = {party: columns.fairness(party, chosen) for party in between}

        def per_s(count: float) -> float:
            return count / measured_s if measured_s else 0.0

        return Group(
            kind=kind,
            name=name,
            outcomes=dict(outcomes),
            metrics={metric: d for metric, d in described.items() if d is not None},
            refusal=describe(refused, seed, percentiles),
            per_s=per_s(len(done)),
            output_tokens_per_s=per_s(sum(record.output_tokens or 0 for record in done)),
            good=int(columns.good[chosen].sum()),
            good_per_s=per_s(int(columns.good[in_time].sum())),
            wrong=sum(bool(record.wrong) for record in some),
            fairness={party: index for party, index in fairness.items() if index is not None},
        )

    found = [group("overall", "all", inside, measured.values())]
    for kind, labels in columns.labels.items():
        found += [
            group(kind, name, inside & (labels == name), [measured[name]] if kind == "phase" else measured.values())
            for name in _names(kind, labels[inside], list(measured))
        ]
    return found


def _names(kind: str, labels: NDArray[np.str_], phases: Sequence[str]) -> list[str]:
    if kind == "phase":
        return list(phases)
    sizes = Counter(labels.tolist())
    sizes.pop("", None)
    if kind in ORDER:
        return [name for name in ORDER[kind] if name in sizes]
    return [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]


def error_counts(records: Iterable[Record]) -> list[tuple[str, int]]:
    """Kinds of error, most frequent first."""
    return Counter(r.error for r in records if r.outcome in (Outcome.FAILED, Outcome.REFUSED)).most_common()
