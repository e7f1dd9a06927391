"""Files to train on, as callers write them: JSONL in OpenAI's forms. Pure but for reading; line by line, never whole.

chat        {"messages": [{"role", "content"}, …]}
preference  {"input": {"messages": […]}, "preferred_output": [message], "non_preferred_output": [message]}
completion  {"prompt": "…", "completion": "…"}

Checked here is the form, so that an upload is refused at once and by line; whether the rows can be learned from (the order of
roles, their length in tokens) is for the trainer to say.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from adapters.errors import InvalidFileError

MAX_LINE_BYTES = 4 * 1024 * 1024  # a row of a million tokens; what is longer is no line, and would fill the memory
ROLES = ("system", "developer", "user", "assistant")

Message = dict[str, str]


class Form(StrEnum):
    CHAT = "chat"
    PREFERENCE = "preference"
    COMPLETION = "completion"


_MARKS = {"messages": Form.CHAT, "input": Form.PREFERENCE, "prompt": Form.COMPLETION}


@dataclass(frozen=True)
class FileFacts:
    rows: int
    form: Form


def check_training_file(path: Path) -> FileFacts:
    """Every line's form; all lines have the first one's. Raises InvalidFileError at the first wrong line, OSError."""
    rows, form = 0, None
    for number, value in read_lines(path):
        found = form_of(value)
        fault = "not an object with `messages`, with `prompt` or with `input`" if found is None else None
        fault = fault or (row_fault(value, found) if found is not None else None)
        if fault is None and form not in (None, found):
            fault = f"a {found} row in a file of {form} rows"
        if fault is not None:
            raise InvalidFileError(number, fault)
        rows, form = rows + 1, found
    if form is None:
        raise InvalidFileError(0, "The file holds no rows.")
    return FileFacts(rows, form)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each line that is not blank. Raises InvalidFileError for what is not JSON."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InvalidFileError(number, f"longer than {MAX_LINE_BYTES:,} bytes")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as exc:
                raise InvalidFileError(number, f"not JSON: {exc.msg} at column {exc.colno}") from exc


def form_of(value: Any) -> Form | None:
    return next((form for mark, form in _MARKS.items() if mark in value), None) if isinstance(value, dict) else None


def row_fault(row: dict[str, Any], form: Form) -> str | None:
    """What is wrong with a row's form; None when nothing is."""
    match form:
        case Form.CHAT:
            return _messages_fault(row["messages"], "messages")
        case Form.COMPLETION:
            missing = [name for name in ("prompt", "completion") if not _text(row.get(name))]
            return f"`{missing[0]}` is no text" if missing else None
        case Form.PREFERENCE:
            asked = row["input"].get("messages") if isinstance(row["input"], dict) else None
            fault = _messages_fault(asked, "input.messages")
            for name in ("preferred_output", "non_preferred_output"):
                fault = fault or _messages_fault(row.get(name), name)
                if fault is None and [message["role"] for message in row[name]] != ["assistant"]:
                    fault = f"{name} is not one assistant message"
            return fault


def _messages_fault(messages: Any, where: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"`{where}` is no list with messages"
    for index, message in enumerate(messages):
        place = f"{where}[{index}]"
        if not isinstance(message, dict):
            return f"{place} is not an object"
        if message.get("tool_calls") or message.get("function_call"):
            return f"{place} calls a tool, which is not trained here"
        if message.get("role") not in ROLES:
            return f"{place}.role is not one of {', '.join(ROLES)}"
        if not _text(message.get("content")):
            return f"{place}.content is no text"
        if message.get("weight", 1) != 1:
            return f"{place}.weight is not 1; every answer is learned here"
    return None


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def trainer_row(row: dict[str, Any], form: Form) -> dict[str, Any]:
    """The row as the trainer's own files have it: `messages`, or `prompt`, `chosen` and `rejected`, all lists of messages."""
    match form:
        case Form.CHAT:
            return {"messages": _plain(row["messages"])}
        case Form.COMPLETION:
            asked, answer = row["prompt"], row["completion"]
            return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        case Form.PREFERENCE:
            return {
                "prompt": _plain(row["input"]["messages"]),
                "chosen": _plain(row["preferred_output"]),
                "rejected": _plain(row["non_preferred_output"]),
            }


def _plain(messages: list[Any]) -> list[Message]:
    """Role and content only; a developer speaks as the system."""
    return [
        {"role": "system" if message["role"] == "developer" else message["role"], "content": message["content"]}
        for message in messages
    ]
