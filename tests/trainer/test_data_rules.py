"""Normalising, length and quality: what passes, what does not, and why."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.data.normal import normalise
from trainer.data.recipe import LengthConfig, QualityConfig
from trainer.data.rules import length_fault, quality_fault

GOOD = "The parcel left the depot this morning and reaches you tomorrow."


def row(answer: str, question: str = "Where is my parcel?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@given(st.text())
@example("e\u200b\u0301")
@example("a \r\n b\r")
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


def test_the_same_text_written_in_other_ways_becomes_the_same() -> None:
    assert normalise("\ufeff cafe\u0301 \r\nau\u00adtumn\u200b\x00  \n") == "café\nautumn"
    assert normalise("👩\u200d💻") == "👩\u200d💻"


@pytest.mark.parametrize(("chars", "said"), [(19, "fewer than 20"), (20, None), (8000, None), (8001, "more than 8000")])
def test_answers_are_between_the_limits(chars: int, said: str | None) -> None:
    fault = length_fault(row("x" * chars), LengthConfig())
    assert fault is None if said is None else said in str(fault)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (GOOD, None),
        ('{"person": [], "organization": ["Acme"], "location": []}', None),
        ("def f(x):\n    return [x[i] * (x[i] - 1) for i in range(len(x))]", None),
        ("送料は無料です。明日までに届きます。", None),
        ("It is yours \ufffd now, as was promised.", "broken"),
        ("It isnâ€™t there yet, but it will be.", "broken"),
        ("again and again " * 20, "repeats itself"),
        ("--- === *** ### --- === *** ### ---", "letters"),
        ("Where is my parcel?", "repeats the question"),
        ("As an AI language model I cannot know.", "phrase"),
    ],
)
def test_poor_answers_are_told_from_good_ones(answer: str, said: str | None) -> None:
    fault = quality_fault(row(answer), QualityConfig())
    assert fault is None if said is None else said in str(fault)


def test_a_long_text_in_plain_words_does_not_count_as_repetition() -> None:
    words = [f"word{number % 400}" for number in range(3000)]
    assert quality_fault(row(" ".join(words)), QualityConfig()) is None


def test_both_answers_of_a_pair_have_to_pass() -> None:
    pair = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": GOOD}]}
    value = pair | {"rejected": [{"role": "assistant", "content": "No."}]}
    assert "3 characters" in str(length_fault(value, LengthConfig()))
