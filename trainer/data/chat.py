"""Chat rows: the one shape every data set has here, a JSON object {"messages": [{"role", "content"}, …]} a line."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import DataError, RowFault

ROLES = ("system", "user", "assistant")

Message = dict[str, str]
Row = list[Message]  # system first or none, then user and assistant in turn, assistant last


def row_fault(value: Any) -> str | None:
    """What keeps a parsed line from being a chat row; None where it is one."""
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        return 'not an object with a list "messages"'
    messages = value["messages"]
    if not messages:
        return '"messages" is empty'
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'{where} is not an object with "role" and "content"'
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            return f"{where} has the role '{role}'; known are {', '.join(ROLES)}"
        if not isinstance(content, str) or not content.strip():
            return f"{where} ({role}) has no text"
        if role == "system" and index > 0:
            return f"{where}: a system message may only be the first"
        previous = messages[index - 1]["role"] if index else None
        if role == "user" and previous == "user":
            return f"{where}: two user messages in a row"
        if role == "assistant" and previous != "user":
            return f"{where}: an assistant message must answer a user message"
    if messages[-1]["role"] != "assistant":
        return "the last message is not the assistant's, so there is nothing to learn"
    return None


def parse_row(line: str) -> Row | str:
    """The row's messages, or what is wrong with the line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as exc:
        return f"not JSON: {exc.msg} at column {exc.colno}"
    fault = row_fault(value)
    if fault is not None:
        return fault
    return [{"role": message["role"], "content": message["content"]} for message in value["messages"]]


def read_rows(path: Path) -> list[Row]:
    """Every row of a JSONL file; blank lines are skipped. Raises DataError naming each bad line."""
    rows: list[Row] = []
    faults: list[RowFault] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = parse_row(line)
                    if isinstance(row, str):
                        faults.append(RowFault(number, row))
                    else:
                        rows.append(row)
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc
    if not rows and not faults:
        faults.append(RowFault(0, "holds no rows"))
    if faults:
        raise DataError(path, faults)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"messages": row}, ensure_ascii=False) + "\n")


def with_system_prompt(row: Row, prompt: str | None) -> Row:
    """As serving does: the prompt opens conversations that bring no system message of their own."""
    if prompt is None or row[0]["role"] == "system":
        return row
    return [{"role": "system", "content": prompt}, *row]


def prompt_of(row: Sequence[Message]) -> Row:
    """Everything before the last answer: what serving will be sent."""
    return list(row[:-1])


def answer_of(row: Sequence[Message]) -> str:
    return row[-1]["content"]
