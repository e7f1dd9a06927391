"""Splits: no duplicate, no leak, the same for the same seed, balanced where asked."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.data.chat import Row, answer_of
from trainer.data.sources import chat_row
from trainer.data.splits import choose_rows, fingerprint, shuffle, split, without_duplicates

QUESTIONS = st.lists(st.text(alphabet="abcAB .,", min_size=1), max_size=20)


def rows_of(questions: list[str]) -> list[Row]:
    return [chat_row("s", question, "yes") for question in questions]


@given(QUESTIONS, QUESTIONS)
def test_no_prompt_is_in_both_splits_or_twice_in_one(train: list[str], evaluation: list[str]) -> None:
    splits = without_duplicates(rows_of(train), rows_of(evaluation))
    in_train, in_eval = [fingerprint(row) for row in splits.train], [fingerprint(row) for row in splits.eval]
    assert not set(in_train) & set(in_eval)
    assert len(set(in_train)) == len(in_train)
    assert len(set(in_eval)) == len(in_eval)
    assert len(in_train) + len(in_eval) + sum(splits.dropped.values()) == len(train) + len(evaluation)


@given(st.integers(0, 5), st.integers(0, 12))
def test_a_split_loses_no_row_and_repeats_itself(seed: int, eval_rows: int) -> None:
    rows = rows_of([str(number) for number in range(10)])
    train, evaluation = split(rows, eval_rows=eval_rows, seed=seed)
    assert (train, evaluation) == split(rows, eval_rows=eval_rows, seed=seed)
    assert sorted(map(str, train + evaluation)) == sorted(map(str, rows))


def test_seeds_give_different_orders() -> None:
    rows = rows_of([str(number) for number in range(50)])
    assert shuffle(rows, seed=0) != shuffle(rows, seed=1)


def test_case_and_punctuation_do_not_make_another_prompt() -> None:
    assert fingerprint(chat_row("a", "Hello, World!", "x")) == fingerprint(chat_row("b", "hello world", "y"))


def test_balanced_rows_take_each_answer_in_turn() -> None:
    rows = [chat_row("s", f"{label}{number}", label) for label in "aaab" for number in range(3)]
    chosen = [answer_of(row) for row in choose_rows(rows, 4, balanced=True)]
    assert chosen == ["a", "b", "a", "b"]


def test_without_a_count_every_row_is_chosen() -> None:
    rows = rows_of(["1", "2", "3"])
    assert choose_rows(rows, None) == rows
    assert len(choose_rows(rows, None, balanced=True)) == 3
