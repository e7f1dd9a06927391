"""Gaps between tokens, counted apart and told together."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gateway.gaps import EDGES_S, GapHistogram, Gaps

SECONDS = st.one_of(st.sampled_from(EDGES_S), st.floats(0, 20))


@given(streams=st.lists(st.tuples(st.sampled_from("ab"), st.lists(SECONDS, min_size=1, max_size=20)), max_size=8))
def test_it_counts_what_a_histogram_that_sees_every_gap_counts(streams: list[tuple[str, list[float]]]) -> None:
    known, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("gap_seconds", "text", ["adapter"], buckets=EDGES_S, registry=known)
    together = GapHistogram("gap_seconds", "text", "adapter")
    ours.register(together)
    for adapter, seconds in streams:
        gaps = Gaps()
        for gap_s in seconds:
            histogram.labels(adapter).observe(gap_s)
            gaps.add(gap_s)
        together.add(adapter, gaps)
    assert counts(ours) == counts(known)


def counts(registry: CollectorRegistry) -> dict[str, float]:
    lines = (line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#"))
    values = dict(line.rsplit(" ", 1) for line in lines if "_created" not in line)
    return {series: round(float(value), 6) for series, value in values.items()}


def test_a_stream_of_one_token_has_no_gap_to_tell() -> None:
    histogram = GapHistogram("gap_seconds", "text", "adapter")
    histogram.add("a", Gaps())
    assert not next(histogram.collect()).samples


def test_what_was_told_once_is_not_changed_by_the_next_stream() -> None:
    histogram, first, second = GapHistogram("gap_seconds", "text", "adapter"), Gaps(), Gaps()
    first.add(0.001)
    second.add(0.001)
    histogram.add("a", first)
    histogram.add("a", second)
    assert first.count == second.count == 1
    assert (first.counts or [])[0] == 1
