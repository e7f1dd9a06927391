"""Gaps between tokens, counted where they happen for the price of a search, and told to Prometheus once a request."""

from bisect import bisect_left
from collections.abc import Iterator
from threading import Lock

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

EDGES_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


class Gaps:
    """Of one stream: how many fell between which edges, and their sum and longest in seconds."""

    __slots__ = ("count", "counts", "longest_s", "sum_s")

    def __init__(self) -> None:
        self.count = 0
        self.counts: list[int] | None = None  # made with the first gap: most answers are not streamed
        self.sum_s = 0.0
        self.longest_s = 0.0

    def add(self, gap_s: float) -> None:
        if self.counts is None:
            self.counts = [0] * (len(EDGES_S) + 1)
        self.counts[bisect_left(EDGES_S, gap_s)] += 1
        self.count += 1
        self.sum_s += gap_s
        if gap_s > self.longest_s:
            self.longest_s = gap_s


class GapHistogram(Collector):
    """A histogram that takes a stream's gaps at once: a gap then costs 0.25 us where it happens, and not 1.4 us."""

    def __init__(self, name: str, documentation: str, label: str) -> None:
        self._name = name
        self._documentation = documentation
        self._label = label
        self._lock = Lock()  # pages are written in a thread
        self._counts: dict[str, list[int]] = {}
        self._sums_s: dict[str, float] = {}

    def add(self, value: str, gaps: Gaps) -> None:
        """value: of the label."""
        if gaps.counts is None:
            return
        with self._lock:
            known = self._counts.get(value)
            self._counts[value] = (
                gaps.counts if known is None else [a + b for a, b in zip(known, gaps.counts, strict=True)]
            )
            self._sums_s[value] = self._sums_s.get(value, 0.0) + gaps.sum_s

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._documentation, labels=[self._label])

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        edges = [*map(floatToGoString, EDGES_S), "+Inf"]
        with self._lock:
            found = [(value, list(counts), self._sums_s[value]) for value, counts in self._counts.items()]
        for value, counts, sum_s in found:
            buckets, total = [], 0
            for edge, count in zip(edges, counts, strict=True):
                total += count
                buckets.append((edge, float(total)))
            family.add_metric([value], buckets=buckets, sum_value=sum_s)
        yield family
