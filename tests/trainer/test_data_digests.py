"""What rows are recognised by: alike rows meet, unlike ones do not, and the form that all share does not count."""

import random
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.digests import Signer, bands, boilerplate_of, jaccard, plain, said, shingles

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ak", "el", "im", "or", "un", "ay")]


def row(question: str, answer: str = "yes", system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def test_case_punctuation_and_spaces_make_no_difference() -> None:
    assert said(row("Hello,  World!")).exact == said(row("hello world")).exact


def test_texts_without_words_are_told_apart() -> None:
    assert said(row("👍")).asked != said(row("👎")).asked
    assert said(row("👍")).shingles(frozenset())[0]


def test_system_messages_tell_rows_apart_but_not_their_prompts() -> None:
    one, other = said(row("q", system="a")), said(row("q", system="b"))
    assert one.exact != other.exact
    assert one.asked == other.asked


def test_where_a_turn_ends_makes_a_difference() -> None:
    assert said(row("a b", "c")).exact != said(row("a", "b c")).exact


@given(st.text())
def test_plain_is_idempotent(given_text: str) -> None:
    assert plain(plain(given_text)) == plain(given_text)


def test_scripts_without_spaces_have_shingles_too() -> None:
    assert len(shingles(plain("送料は無料ですがお届けまでに二日かかりますのでお待ちください"))) > 10


@given(st.integers(0, 500))
def test_near_rows_share_a_band_and_unlike_ones_do_not(seed: int) -> None:
    signer = Signer()
    words = text(80, seed).split()
    changed = [*words[:40], "changed", *words[41:]]
    one, near, other = (shingles(" ".join(each)) for each in (words, changed, text(80, seed + 10_000).split()))
    assert jaccard(one, near) > 0.9
    signed = bands(np.stack([signer.sign(each) for each in (one, near, other)]))
    assert (signed[0] == signed[1]).any()
    assert not (signed[0] == signed[2]).any()


def test_a_union_is_signed_by_the_smaller_of_both() -> None:
    signer = Signer()
    one, other = shingles(text(30, 1)), shingles(text(30, 2))
    assert np.array_equal(signer.sign([*one, *other]), np.minimum(signer.sign(one), signer.sign(other)))


def test_an_instruction_that_every_prompt_repeats_is_no_sign_of_likeness() -> None:
    form = text(60, 0)
    rows = [said(row(f"{form} {text(12, seed)}", text(3, -seed))) for seed in range(1, 60)]
    boilerplate = boilerplate_of(rows)
    with_form = [jaccard(rows[0].shingles(frozenset())[0], each.shingles(frozenset())[0]) for each in rows[1:]]
    without = [jaccard(rows[0].shingles(boilerplate)[0], each.shingles(boilerplate)[0]) for each in rows[1:]]
    assert min(with_form) > 0.6
    assert max(without) < 0.3


def test_rows_that_are_nothing_but_form_keep_their_shingles() -> None:
    rows = [said(row(text(20, 0), f"answer {number}")) for number in range(30)]
    assert rows[0].shingles(boilerplate_of(rows)) == rows[0].shingles(frozenset())


def test_rows_that_are_there_many_times_are_no_form() -> None:
    assert not boilerplate_of([said(row(text(20, number % 10))) for number in range(100)])
