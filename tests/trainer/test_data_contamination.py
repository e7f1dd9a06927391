"""Training rows that hold what is judged are found; what benchmarks share among themselves is not held against them."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.contamination import GRAM_WORDS, Decontaminator, read_benchmark

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ak", "el", "im", "or", "un", "ay")]


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def row(question: str, answer: str = "yes", system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


QUESTIONS = [{"question": text(30, seed), "choices": [text(5, seed + 1000), "yes"], "answer": 0} for seed in range(20)]


@pytest.fixture(scope="module")
def decontaminator() -> Decontaminator:
    return Decontaminator([read_benchmark("exam", QUESTIONS)])


@given(seed=st.integers(0, 19), first=st.integers(0, 30 - GRAM_WORDS), before=st.integers(0, 20))
def test_any_thirteen_words_of_a_question_are_found(
    decontaminator: Decontaminator, seed: int, first: int, before: int
) -> None:
    run = " ".join(text(30, seed).split()[first : first + GRAM_WORDS])
    hit = decontaminator.find(row(f"{text(before, 77)} {run.upper()}! {text(3, 78)}"))
    assert hit is not None
    assert (hit.benchmark, run in hit.how) == ("exam", True)


def test_twelve_words_and_short_answers_are_chance(decontaminator: Decontaminator) -> None:
    run = " ".join(text(30, 3).split()[: GRAM_WORDS - 1])
    assert decontaminator.find(row(f"{text(9, 77)} {run} {text(9, 78)}", "yes")) is None


def test_a_whole_short_text_is_found_in_either_turn(decontaminator: Decontaminator) -> None:
    assert decontaminator.find(row("Which?", QUESTIONS[4]["choices"][0].title() + ".")) is not None  # type: ignore[index]


def test_the_form_that_questions_share_is_not_held_against_a_row() -> None:
    form = text(20, 5)
    benchmark = read_benchmark(
        "exam", [{"messages": [{"role": "user", "content": f"{form} {text(9, seed)}"}]} for seed in range(20)]
    )
    assert Decontaminator([benchmark]).find(row(f"{form} {text(9, 99)}")) is None


def test_system_messages_of_a_benchmark_are_not_compared() -> None:
    shared = text(20, 6)
    benchmark = read_benchmark("exam", [row("one two three four five", system=shared)])
    assert Decontaminator([benchmark]).find(row("What?", "Nothing", system=shared)) is None


def test_without_benchmarks_nothing_is_found() -> None:
    assert Decontaminator([]).find(row(text(30, 1))) is None
