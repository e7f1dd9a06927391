from pathlib import Path

import numpy as np
import pytest

from loadtests.errors import ScenarioError
from loadtests.prompts import QUESTIONS, load_prompts, text_of
from loadtests.shapes import BuiltinPrompts, FilePrompts, SyntheticPrompts, UniformLengths
from loadtests.traces import TraceRow


def draws(source: BuiltinPrompts | FilePrompts | SyntheticPrompts, count: int = 200) -> list[str]:
    rng, prompts = np.random.default_rng(1), load_prompts(source)
    return [prompts.draw(rng) for _ in range(count)]


def test_every_question_that_comes_along_is_asked() -> None:
    assert set(draws(BuiltinPrompts())) == set(QUESTIONS)


def test_synthetic_prompts_have_the_lengths_asked_for() -> None:
    assert {len(text.split()) for text in draws(SyntheticPrompts(kind="synthetic", words=33))} == {33}
    spread = SyntheticPrompts(kind="synthetic", words=UniformLengths(kind="uniform", low=5, high=8))
    assert {len(text.split()) for text in draws(spread)} == {5, 6, 7, 8}


def test_prompt_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert set(draws(FilePrompts(kind="file", path=tmp_path / "p.txt"))) == {"one", "two"}
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    assert set(draws(FilePrompts(kind="file", path=tmp_path / "p.jsonl"))) == {"hello"}


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"prompt": "hello"}\n{"promt": 1}\n', "prompt 2"), ("", "holds no prompts"), (None, "cannot be read")],
)
def test_a_prompt_file_without_prompts_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ScenarioError, match=said):
        load_prompts(FilePrompts(kind="file", path=tmp_path / "p.jsonl"))


def recorded(tokens: int, *blocks: int, seed: int = 0) -> list[str]:
    return " ".join(text_of(TraceRow(0.0, tokens, 1, blocks=blocks), np.random.default_rng(seed), 1)).split()


@pytest.mark.parametrize("tokens", [1, 7, 1024, 1300])
def test_a_recorded_prompt_has_as_many_words_as_it_had_tokens(tokens: int) -> None:
    assert len(recorded(tokens)) == len(recorded(tokens, 3, 4, 5)) == tokens
    assert len(recorded(0)) == 1  # a server refuses an empty one


def test_prompts_that_began_alike_begin_alike_again() -> None:
    first, second, third = recorded(1500, 1, 2, 3), recorded(1100, 1, 2, 9, seed=5), recorded(1500, 1, 7, 3)
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:]
    assert first[:512] == third[:512]
    assert first[512:1024] != third[512:1024]
