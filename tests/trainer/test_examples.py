"""What a stage learns from: every method's rows in tokens, as serving renders them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import TrainConfig
from trainer.data.card import Preference, file_sha256
from trainer.errors import DataError
from trainer.examples import Examples, cut_text, hold_out, load_examples, pair_features, sequences_of, text_as_chat
from trainer.template import ChatRenderer, load_renderer

ASKED = [{"role": "user", "content": "Which?"}]


@pytest.fixture(scope="module")
def renderer(tokenizer_folder: Path) -> ChatRenderer:
    return load_renderer(tokenizer_folder)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def load(renderer: ChatRenderer, folder: Path, **settings: Any) -> Examples:
    config = TrainConfig.model_validate({"name": "x", "max_tokens": 64, "goldens": 2, **settings})
    return load_examples(config, config, renderer, relative_to=folder, fetch=lambda name: folder)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pair_is_the_served_prompt_and_two_answers_with_their_ends(renderer: ChatRenderer) -> None:
    features = pair_features(renderer, Preference(ASKED, said("This."), said("That one.")), system_prompt="Be brief.")
    decoded = {name: renderer.decode(ids) for name, ids in features.items()}
    prompt = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert features["prompt_ids"] == renderer.prompt_ids(prompt)
    assert decoded["chosen_ids"] == "This.<|im_end|>"
    assert decoded["rejected_ids"] == "That one.<|im_end|>"
    assert sequences_of(features) == [
        len(features["prompt_ids"]) + len(features[name]) for name in ("chosen_ids", "rejected_ids")
    ]


@given(text=st.text(min_size=1, max_size=200), max_tokens=st.integers(9, 50))
def test_no_token_of_a_text_is_lost_by_cutting_it(renderer: ChatRenderer, text: str, max_tokens: int) -> None:
    pieces = cut_text(renderer, text, max_tokens=max_tokens)
    ids = [token for piece in pieces for token in piece["input_ids"]]
    whole = [*renderer.tokenizer(text, add_special_tokens=False)["input_ids"], renderer.tokenizer.eos_token_id]
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) <= 1  # a last piece of one token could predict nothing
    assert all(len(piece["input_ids"]) <= max_tokens and piece["labels"] == piece["input_ids"] for piece in pieces)


def test_a_texts_beginning_is_asked_as_a_chat() -> None:
    assert text_as_chat("too short here") == []
    row = text_as_chat(" ".join(f"w{number}" for number in range(10)))
    assert [message["role"] for message in row] == ["user", "assistant"]
    assert row[0]["content"] == "w0 w1 w2 w3 w4"


def test_pairs_of_ones_own_are_split_by_seed(renderer: ChatRenderer, tmp_path: Path) -> None:
    rows = [{"prompt": ASKED, "chosen": said(f"yes {n}"), "rejected": said("no")} for n in range(20)]
    path = write(tmp_path / "pairs.jsonl", rows)
    found = load(renderer, tmp_path, method="dpo", data={"train": "pairs.jsonl", "licence": "MIT"})
    assert (len(found.train), len(found.eval), len(found.prompts)) == (18, 2, 2)
    assert found.lineage[0].digest == file_sha256(path)
    again = load(renderer, tmp_path, method="dpo", data={"train": "pairs.jsonl", "licence": "MIT"})
    assert again.train == found.train


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "text", "chosen": [], "rejected": []}, "lists of messages"),
        ({"prompt": ASKED, "chosen": said("a"), "rejected": []}, "prompt and rejected"),
        ({"prompt": [], "chosen": said("a"), "rejected": said("b")}, "prompt and chosen"),
    ],
)
def test_a_faulty_pair_names_its_line(renderer: ChatRenderer, tmp_path: Path, row: Any, reason: str) -> None:
    write(tmp_path / "pairs.jsonl", [{"prompt": ASKED, "chosen": said("a"), "rejected": said("b")}, row])
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{reason}"):
        load(renderer, tmp_path, method="dpo", data={"train": "pairs.jsonl"})


def test_raw_text_without_text_names_its_line(renderer: ChatRenderer, tmp_path: Path) -> None:
    write(tmp_path / "texts.jsonl", [{"text": "fine"}, {"text": " "}])
    with pytest.raises(DataError, match=r"texts\.jsonl:2: .*not empty"):
        load(renderer, tmp_path, method="pretrain", data={"train": "texts.jsonl"})


def built_folder(folder: Path, form: str, rows: list[Any]) -> None:
    write(folder / "train.jsonl", rows[2:])
    write(folder / "eval.jsonl", rows[:2])
    card = {
        "name": "mine",
        "format": form,
        "seed": 0,
        "train": {"rows": len(rows) - 2, "sha256": file_sha256(folder / "train.jsonl")},
        "eval": {"rows": 2, "sha256": file_sha256(folder / "eval.jsonl")},
        "sources": [{"name": "src", "licence": "MIT", "sha256": "0" * 64, "rows": len(rows)}],
    }
    (folder / "dataset.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("method", "form", "row"),
    [
        ("sft", "chat", {"messages": [*ASKED, *said("This.")]}),
        ("pretrain", "text", {"text": "Once upon a time there was a text."}),
        ("dpo", "preference", {"prompt": ASKED, "chosen": said("This."), "rejected": said("That.")}),
    ],
)
def test_a_built_data_set_brings_rows_and_lineage(
    renderer: ChatRenderer, tmp_path: Path, method: str, form: str, row: Any
) -> None:
    built_folder(tmp_path, form, [row] * 5)
    found = load(renderer, tmp_path, method=method, data={"folder": "."})
    assert (len(found.train), len(found.eval)) == (3, 2)
    assert [(source.name, source.licence) for source in found.lineage] == [("src", "MIT")]
    assert found.trained_tokens > 0
    other = "pretrain" if method == "sft" else "sft"
    with pytest.raises(DataError, match=f"holds {form} rows"):
        load(renderer, tmp_path, method=other, data={"folder": "."})


def test_a_built_data_set_that_was_changed_is_refused(renderer: ChatRenderer, tmp_path: Path) -> None:
    built_folder(tmp_path, "text", [{"text": "Once upon a time."}] * 5)
    write(tmp_path / "train.jsonl", [{"text": "Something else."}])
    with pytest.raises(DataError, match="not the file"):
        load(renderer, tmp_path, method="pretrain", data={"folder": "."})


@given(rows=st.lists(st.integers(), min_size=2, max_size=60), seed=st.integers(0, 5))
def test_a_tenth_is_held_out_and_nothing_lost(rows: list[int], seed: int) -> None:
    train, held_out = hold_out(rows, seed=seed)
    assert sorted(train + held_out) == sorted(rows)
    assert len(held_out) == max(1, round(len(rows) / 10))
    assert hold_out(rows, seed=seed) == (train, held_out)
