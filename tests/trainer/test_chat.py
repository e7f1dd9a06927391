"""Chat rows: what is accepted, and how a bad line is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.chat import parse_row, read_rows, row_fault, with_system_prompt, write_rows
from trainer.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize("messages", [[USER, ASSISTANT], [SYSTEM, USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]])
def test_a_conversation_that_ends_with_the_assistant_is_a_row(messages: list[dict[str, str]]) -> None:
    assert row_fault({"messages": messages}) is None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ([USER], "last message"),
        ([ASSISTANT], "must answer"),
        ([USER, SYSTEM, ASSISTANT], "only be the first"),
        ([USER, USER, ASSISTANT], "two user messages"),
        ([SYSTEM, ASSISTANT], "must answer"),
        ([USER, {"role": "assistant", "content": "  "}], "no text"),
        ([{"role": "tool", "content": "x"}, ASSISTANT], "role 'tool'"),
        ([USER, {"role": "assistant"}], "no text"),
        (["hello"], "not an object"),
    ],
)
def test_each_fault_is_named(messages: list[Any], said: str) -> None:
    assert said in str(row_fault({"messages": messages}))


def test_bad_lines_are_reported_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [USER, ASSISTANT]})
    path.write_text(f"{good}\n\nnot json\n{json.dumps({'messages': [USER]})}\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert [fault.line for fault in caught.value.faults] == [3, 4]
    assert f"{path}:3" in str(caught.value)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_rows(tmp_path / "empty.jsonl")


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "missing.jsonl")


@given(st.text())
def test_no_line_breaks_the_parser(line: str) -> None:
    assert isinstance(parse_row(line), (str, list))


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=3))
def test_rows_survive_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]]
) -> None:
    row = [
        {"role": role, "content": text + "."}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, [row])
    assert read_rows(path) == [row]


def test_the_system_prompt_opens_only_what_brings_none() -> None:
    told = {"role": "system", "content": "Be brief."}
    assert with_system_prompt([USER, ASSISTANT], "Be brief.") == [told, USER, ASSISTANT]
    assert with_system_prompt([told, USER, ASSISTANT], "Be long.") == [told, USER, ASSISTANT]
    assert with_system_prompt([USER, ASSISTANT], None) == [USER, ASSISTANT]
