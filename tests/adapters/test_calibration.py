"""Rows to calibrate on: rendered with the checkpoint's template, sampled alike every time, refused by name when broken."""

import json
from pathlib import Path

import pytest

from adapters import calibration
from adapters.calibration import held_out_file, read_calibration, training_file
from adapters.errors import QuantizeError


class Tokenizer:
    """A token for each character; a template of role and content."""

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        return "".join(f"<{one['role']}>{one['content']}" for one in messages)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "load_tokenizer", lambda checkpoint: Tokenizer())


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(number: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"row {number}"}, {"role": "assistant", "content": "yes"}]}


def read(path: Path, rows: int = 4, context_tokens: int = 100) -> list[str]:
    found = read_calibration(path, path, rows=rows, context_tokens=context_tokens)
    return ["".join(map(chr, ids)) for ids in found]


def test_every_kind_of_row_is_rendered_whole(tmp_path: Path) -> None:
    pair = {"prompt": [{"role": "user", "content": "why"}], "chosen": [{"role": "assistant", "content": "so"}]}
    rows: list[object] = [chat(1), {"text": "plain text"}, {**pair, "rejected": []}]
    assert sorted(read(write(tmp_path / "rows.jsonl", rows))) == [
        "<user>row 1<assistant>yes",
        "<user>why<assistant>so",
        "plain text",
    ]


def test_a_sample_is_the_same_every_time_and_of_different_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat(number) for number in range(500)])
    sample = read(path, rows=20)
    assert sample == read(path, rows=20)
    assert len(set(sample)) == 20
    assert any(int(text.split()[1].split("<")[0]) > 250 for text in sample)


def test_a_long_row_is_cut_and_a_short_one_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "x" * 300}, {"text": "short"}])
    assert read(path, context_tokens=50) == ["x" * 50]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "not JSON lines"), ('{"instruction": 1}', "a row needs"), ('{"text": ""}', "no row of at")],
)
def test_what_is_no_row_is_refused_with_its_text(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(QuantizeError, match=words):
        read(tmp_path / "rows.jsonl")


def test_a_data_set_is_calibrated_on_by_its_training_rows_and_asked_by_the_others(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"train\.jsonl"):
        training_file(tmp_path)
    train = write(tmp_path / "train.jsonl", [chat(1)])
    assert held_out_file(tmp_path) is None
    held_out = write(tmp_path / "eval.jsonl", [chat(2)])
    assert (training_file(tmp_path), held_out_file(tmp_path)) == (train, held_out)
    assert held_out_file(train) is None
    assert held_out_file(None) is None
