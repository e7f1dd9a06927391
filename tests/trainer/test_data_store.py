"""Rows on disk: found again by number, and those that share a number found however many ranges it takes."""

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.store import RowStore, drawn, shuffled

KEYS = st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=40)


def store_of(folder: Path, keys: list[int], *, at_once: int = 1000) -> RowStore:
    store = RowStore(folder, {"key": np.uint64}, sorted_at_once=at_once)
    for first in range(0, len(keys), 7):
        part = keys[first : first + 7]
        lines = [f'{{"text":"{first + place}"}}\n'.encode() for place in range(len(part))]
        sizes = np.array([len(line) for line in lines], dtype=np.uint32)
        store.append(b"".join(lines), sizes, {"key": np.array(part, dtype=np.uint64)})
    store.flush()
    return store


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=KEYS, among=st.lists(st.booleans(), min_size=40, max_size=40), at_once=st.integers(1, 50))
def test_rows_with_the_same_number_are_paired(tmp_path: Path, keys: list[int], among: list[bool], at_once: int) -> None:
    mask = np.array(among[: len(keys)], dtype=np.bool_)
    with store_of(tmp_path, keys, at_once=at_once) as store:
        found = set(store.equal_pairs("key", mask))
    wanted = set()
    for later in range(len(keys)):
        before = [row for row in range(later) if keys[row] == keys[later] and mask[row] and mask[later]]
        if before:
            wanted.add((before[-1], later))
    assert found == wanted


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=KEYS, one=st.lists(st.booleans(), min_size=40, max_size=40))
def test_meetings_are_all_pairs_across_two_sides(tmp_path: Path, keys: list[int], one: list[bool]) -> None:
    mask = np.array(one[: len(keys)], dtype=np.bool_)
    with store_of(tmp_path, keys) as store:
        found = sorted(store.meetings("key", mask, ~mask))
    rows = range(len(keys))
    assert found == [(a, b) for a in rows for b in rows if mask[a] and not mask[b] and keys[a] == keys[b]]


def test_every_row_can_be_read_back(tmp_path: Path) -> None:
    with store_of(tmp_path, list(range(20))) as store:
        assert [store.value(row)["text"] for row in (0, 7, 19)] == ["0", "7", "19"]
        assert store.column("key", 5, 3).tolist() == [5, 6, 7]


@given(st.integers(0, 2**63), st.integers(1, 300))
def test_shuffling_keeps_every_row_and_depends_on_the_seed_only(seed: int, count: int) -> None:
    ids = np.arange(count, dtype=np.int64)
    order = shuffled(ids, seed)
    assert sorted(order.tolist()) == ids.tolist()
    assert np.array_equal(order, shuffled(ids, seed))


def test_draws_are_spread_evenly() -> None:
    counts = np.histogram(drawn(np.arange(100_000), 3).astype(np.float64), bins=10, range=(0, 2.0**64))[0]
    assert abs(counts - 10_000).max() < 500
