"""Files to train on: every fault is told with its line, and what passes is what the trainer reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidFileError
from adapters.training_files import FileFacts, Form, check_training_file, trainer_row

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIR = {
    "input": {"messages": [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": "Hi"}]},
    "preferred_output": [{"role": "assistant", "content": "Hello"}],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}
COMPLETION = {"prompt": "Hi", "completion": "Hello"}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("row", "form"), [(CHAT, Form.CHAT), (PAIR, Form.PREFERENCE), (COMPLETION, Form.COMPLETION)], ids=str
)
def test_each_form_is_recognised_and_counted(row: Any, form: Form, tmp_path: Path) -> None:
    assert check_training_file(written(tmp_path / "f", "\ufeff" + json.dumps(row), "", row)) == FileFacts(2, form)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ([1], "not an object"),
        ({"text": "x"}, "not an object with `messages`"),
        (PAIR, "a preference row in a file of chat rows"),
        ({"messages": []}, "`messages` is no list"),
        ({"messages": [{"role": "king", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": " "}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "calls a tool"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight"),
    ],
)
def test_a_fault_is_told_with_its_line(line: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match=f"^Line 3: .*{fault}") as wrong:
        check_training_file(written(tmp_path / "f", CHAT, "", line, CHAT))
    assert wrong.value.line == 3


@pytest.mark.parametrize(
    "change",
    [
        {"input": {}},
        {"input": []},
        {"preferred_output": []},
        {"non_preferred_output": [{"role": "user", "content": "x"}]},
        {"preferred_output": PAIR["preferred_output"] * 2},  # type: ignore[operator]
    ],
)
def test_a_pair_needs_a_prompt_and_one_answer_of_each_kind(change: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="Line 1"):
        check_training_file(written(tmp_path / "f", {**PAIR, **change}))


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_a_file_without_rows_is_refused_as_a_whole(text: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(InvalidFileError, match="no rows") as wrong:
        check_training_file(tmp_path / "f")
    assert wrong.value.line == 0


@given(data=st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused_with_a_line(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    line = 0
    try:
        assert check_training_file(path).rows > 0
    except InvalidFileError as wrong:
        line = wrong.line
    assert 0 <= line <= data.count(b"\n") + 1


def test_rows_become_the_trainers() -> None:
    assert trainer_row(CHAT, Form.CHAT) == CHAT
    assert trainer_row(COMPLETION, Form.COMPLETION) == CHAT
    pair = trainer_row(PAIR, Form.PREFERENCE)
    assert pair["prompt"][0] == {"role": "system", "content": "Be kind"}
    assert (pair["chosen"], pair["rejected"]) == (PAIR["preferred_output"], PAIR["non_preferred_output"])
