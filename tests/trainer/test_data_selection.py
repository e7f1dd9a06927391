"""Which rows are held out: whole groups, as many as asked for, by seed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.groups import Groups
from trainer.data.recipe import SplitConfig
from trainer.data.selection import hold_out, surplus

JOINS = st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=60)


def groups_of(joins: list[tuple[int, int]], rows: int = 60) -> Groups:
    groups = Groups(rows)
    for one, other in joins:
        groups.join(one, other)
    return groups


@given(JOINS)
def test_the_first_row_stands_for_its_group(joins: list[tuple[int, int]]) -> None:
    groups = groups_of(joins)
    roots = groups.roots()
    assert all(roots[one] == roots[other] for one, other in joins)
    assert all(roots[row] == groups.find(row) == min(np.flatnonzero(roots == roots[row])) for row in range(60))
    assert np.array_equal(Groups(roots).roots(), roots)


@given(JOINS, st.integers(0, 1000), st.floats(0.05, 0.6), st.lists(st.booleans(), min_size=60, max_size=60))
def test_no_group_stands_on_both_sides(joins: list[tuple[int, int]], seed: int, share: float, rows: list[bool]) -> None:
    mask, roots = np.array(rows), groups_of(joins).roots()
    held_out = hold_out(mask, roots, SplitConfig(eval_share=share), seed)
    assert not held_out[~mask].any()
    assert not set(roots[held_out]) & set(roots[mask & ~held_out])
    assert held_out.sum() <= max(1, round(mask.sum() * share))


def test_rows_that_are_alone_are_held_out_to_the_number() -> None:
    roots = np.arange(1000)
    held_out = hold_out(np.ones(1000, dtype=np.bool_), roots, SplitConfig(eval_share=0.1, eval_rows=70), 1)
    assert held_out.sum() == 70
    assert not np.array_equal(held_out, hold_out(held_out | True, roots, SplitConfig(eval_rows=70), 2))


def test_one_group_that_is_everything_cannot_be_held_out() -> None:
    assert not hold_out(np.ones(10, dtype=np.bool_), np.zeros(10, dtype=np.int64), SplitConfig(), 0).any()


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60), st.dictionaries(st.sampled_from("abc"), st.integers(0, 20))
)
def test_a_plan_leaves_no_more_of_a_class_than_it_says(labels: list[int], plan: dict[str, int]) -> None:
    numbers = np.array(labels, dtype=np.uint16)
    gone = surplus(np.ones(len(labels), dtype=np.bool_), numbers, "abc", plan, 0)
    left = np.delete(numbers, gone)
    for number, name in enumerate("abc", start=1):
        assert (left == number).sum() == min((numbers == number).sum(), plan.get(name, 0))
    assert (left == 0).sum() == (numbers == 0).sum()
