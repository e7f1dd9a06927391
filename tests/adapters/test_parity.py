"""What models are compared on, and the figures that come of it; with a tiny model where one is needed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import open_checkpoint, read_base
from adapters.errors import MergeError
from adapters.manifest import Golden
from adapters.parity import (
    Questions,
    Reference,
    Seen,
    Texts,
    check_memory,
    compare,
    greedy,
    groups,
    load_model,
    look,
    questions_for,
    read_rows,
    stop_ids,
)
from tests.factories import make_base


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=20),
    room=st.integers(0, 100),
)
def test_every_sequence_is_in_one_group_and_groups_stay_small(lengths: list[int], room: int) -> None:
    sequences = [[0] * length for length in lengths]
    found = list(groups(sequences, room=room))
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        longest = max(lengths[index] for index in group)
        assert len(group) == 1 or (longest + room) * len(group) <= 1024


def test_prompts_are_read_without_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "Once upon"},
        {"text": "a time"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read_rows(path) == [[{"role": "user", "content": "Hi"}], "Once upon", "a time"]


@pytest.mark.parametrize("line", ["{}", "[1]", "no JSON", '{"messages": [{"role": "system", "content": "x"}]}'])
def test_a_row_that_is_no_prompt_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(MergeError, match="line 2"):
        read_rows(path)


def test_goldens_and_a_sample_are_cut_to_what_the_context_holds(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", context_tokens=64)
    golden = Golden(
        messages=[],
        completion="",
        prompt_token_ids=list(range(60)),
        completion_token_ids=[5] * 40,
        logprobs=[],
        base_logprobs=[],
    )
    asked = questions_for(base, read_base(base), [golden])
    assert [each.name for each in asked.sets] == ["goldens", "sample"]
    assert asked.greedy_tokens == 32
    assert asked.sets[0].answers is not None
    assert len(asked.sets[0].prompts[0]) + len(asked.sets[0].answers[0]) <= 64
    assert asked.sets[0].prompts[0][-1] == 59
    assert asked.stop_ids == stop_ids(base) == frozenset({2})


def test_prompts_in_words_need_a_tokenizer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(MergeError, match="no tokenizer"):
        questions_for(base, read_base(base), [], prompts=tmp_path / "rows.jsonl")


def test_figures_tell_the_largest_and_mean_difference_and_equal_choices() -> None:
    one = Seen(np.array([-1.0, -2.0, -3.0], np.float32), np.array([1, 2, 3]))
    other = Seen(np.array([-1.5, -2.0, -3.25], np.float32), np.array([1, 2, 4]), np.array([0.3, 0.0, 0.0]))
    wanted, given_ = Texts(((1, 2), (3,)), (True, True)), Texts(((1, 2), (4,)), (True, False))
    figures = compare(one, other, wanted, given_)
    assert (figures.max_abs, figures.mean_abs) == (0.5, 0.25)
    assert figures.top1 == pytest.approx(2 / 3)
    assert figures.kl == pytest.approx(0.1)
    assert (figures.stop_rate, figures.reference_stop_rate, figures.same_text, figures.prompts) == (0.5, 1.0, 0.5, 2)


def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    tensors = open_checkpoint(make_base(tmp_path / "base"))
    check_memory(tensors, free_bytes=2 << 30)
    with pytest.raises(MergeError, match="--parity weights"):
        check_memory(tensors, free_bytes=1 << 30)


@pytest.mark.slow
def test_a_model_is_equal_to_itself_and_padding_changes_nothing(tmp_path: Path) -> None:
    import torch

    base = make_base(tmp_path / "base", seed=3)
    model = load_model(base, torch.float32)
    asked = questions_for(base, read_base(base), [], greedy_tokens=8)
    reference = Reference(model, asked, tmp_path)
    figures = reference.hold(model)["sample"]
    assert (figures.max_abs, figures.top1, figures.same_text) == (0.0, 1.0, 1.0)
    assert figures.kl == pytest.approx(0.0, abs=1e-9)
    prompts = [(5,), (7, 8, 9, 10, 11), (3, 4)]
    together = greedy(model, prompts, asked)
    for prompt, text in zip(prompts, together.tokens, strict=True):
        assert greedy(model, [prompt], asked).tokens[0] == text
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *text]])).logits[0].log_softmax(-1)
        assert text == tuple(logprobs.argmax(-1).tolist()[len(prompt) - 1 : -1])
    seen, full = look(model, [(5, 6, 7), (8, 9)], store=tmp_path / "full")
    assert full.shape == (3, 128)
    assert seen.logprobs[2] == pytest.approx(float(full[2, 9]))
    assert np.allclose(np.exp(full).sum(axis=1), 1, atol=1e-4)


@pytest.mark.slow
def test_the_kl_divergence_is_that_of_whole_distributions(tmp_path: Path) -> None:
    import torch

    one, other = (load_model(make_base(tmp_path / str(seed), seed=seed), torch.float32) for seed in (0, 1))
    asked = Questions((), frozenset({2}))
    _, full = look(one, [(5, 6, 7, 8)], store=tmp_path / "full")
    seen, _ = look(other, [(5, 6, 7, 8)], against=full)
    with torch.no_grad():
        theirs = other(torch.tensor([[5, 6, 7, 8]])).logits[0, :-1].log_softmax(-1).double().numpy()
    mine = np.asarray(full, np.float64)
    assert seen.kl is not None
    assert np.allclose(seen.kl, (np.exp(mine) * (mine - theirs)).sum(-1), rtol=1e-4)
    assert asked.source == ""
