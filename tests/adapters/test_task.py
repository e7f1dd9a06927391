"""A task's score: rows with short answers are found, others are told apart from them, and white space does not count."""

import json
from pathlib import Path

import pytest

from adapters import task
from adapters.errors import QuantizeError
from adapters.task import Task, find_task


class Tokenizer:
    """A token for each character; a template of role and content."""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert add_generation_prompt
        return "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "load_tokenizer", lambda checkpoint: Tokenizer())


def write(path: Path, answers: list[str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"row {number}"}, {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def find(given: Path | None, data: Path | None = None) -> Task | None:
    return find_task(given, data, Path(), context_tokens=200, answer_tokens=8)


def test_rows_with_short_answers_are_the_task(tmp_path: Path) -> None:
    found = find(write(tmp_path / "rows.jsonl", [f" {number} " for number in range(10)] + ["far too long an answer"]))
    assert found is not None
    assert sorted(found.answers) == [str(number) for number in range(10)]
    assert f"<user>row {found.answers[0]}<assistant>" == "".join(map(chr, found.prompts[0]))


def test_a_data_sets_held_out_rows_are_its_task(tmp_path: Path) -> None:
    write(tmp_path / "eval.jsonl", ["yes"] * 9)
    write(tmp_path / "train.jsonl", ["no"] * 9)
    for found in (find(tmp_path), find(None, tmp_path)):
        assert found is not None
        assert found.answers == ("yes",) * 9
        assert found.source == f"{tmp_path.name}/eval.jsonl"


def test_data_without_short_answers_have_no_task_and_one_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "eval.jsonl", ["much longer than any class"] * 20)
    assert find(None, tmp_path) is None
    assert find(None, None) is None
    with pytest.raises(QuantizeError, match="0 chats that end with an answer of fewer than 8 tokens"):
        find(tmp_path)
    with pytest.raises(QuantizeError, match="nor a folder with"):
        find(tmp_path / "nothing")


def test_the_score_is_the_share_of_right_texts() -> None:
    four = Task("rows", ((1,),) * 4, ("a", "b", "c", "d"))
    score = four.compare(["a", " b\n", "c", "x"], ["a", "x", "x", "x"])
    assert (score.rows, score.before, score.after) == (4, 0.75, 0.25)
    assert str(score) == "Right answers on 4 rows of rows: 75.0% before, 25.0% after"
