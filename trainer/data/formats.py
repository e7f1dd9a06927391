"""Formats of rows: recognised by their fields, and turned into the one that is written. Pure.

In: chat ("messages" or "conversations"), ShareGPT, Alpaca, prompt/completion, preference pairs, text.
Out: {"messages": […]}, {"prompt": […], "chosen": […], "rejected": […]} or {"text": …}.
"""

from collections.abc import Mapping
from typing import Any, cast

import orjson

from trainer.data.card import DataFormat
from trainer.data.chat import Row, row_fault
from trainer.data.recipe import RowFormat

Value = dict[str, Any]  # a row as it is written

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
MADE_OF: Mapping[DataFormat, tuple[RowFormat, ...]] = {
    "chat": ("chat", "sharegpt", "alpaca", "prompt-completion"),
    "preference": ("preference",),
    "text": ("text",),
}
COMPLETIONS = ("completion", "response", "answer")
PROMPTS = ("prompt", "question")
TURNS = ("messages", "conversations", "conversation")


def recognise(value: Any) -> RowFormat | None:
    """The format of one parsed row; None where no format fits."""
    if not isinstance(value, dict):
        return None
    if "chosen" in value and "rejected" in value:
        return "preference"
    turns = _turns(value)
    if turns is not None:
        return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "chat"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if _first(value, PROMPTS) is not None and _first(value, COMPLETIONS) is not None:
        return "prompt-completion"
    return "text" if "text" in value else None


def to_value(raw: Any, wanted: DataFormat, given: RowFormat | None = None) -> Value | str:
    """The row as it is to be written, or what keeps it from being one.

    given: the format the source is said to have; None: recognised.
    """
    kind = given or recognise(raw)
    if kind is None:
        return "no format known here: neither chat, ShareGPT, Alpaca, prompt/completion, preference nor text"
    if kind not in MADE_OF[wanted]:
        return f"a {kind} row, and the data set is of {wanted} rows"
    if not isinstance(raw, dict):
        return "not an object"
    if kind == "text":
        text = raw.get("text")
        return {"text": text} if isinstance(text, str) and text.strip() else '"text" is empty'
    if kind == "preference":
        return _preference(raw)
    messages = {"chat": _chat, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt-completion": _completion}[kind](raw)
    return messages if isinstance(messages, str) else _checked(messages)


def _checked(messages: list[Any]) -> Value | str:
    fault = row_fault({"messages": messages})
    return fault or {"messages": [{"role": each["role"], "content": each["content"]} for each in messages]}


def _chat(raw: Value) -> list[Any] | str:
    turns = _turns(raw)
    return 'not an object with a list "messages"' if turns is None else [_plain(turn) for turn in turns]


def _plain(turn: Any) -> Any:
    """A message whose content is a list of text parts, as one text."""
    parts = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(parts, list):
        return turn
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return {**turn, "content": "".join(cast(list[str], texts)) if whole else None}


def _sharegpt(raw: Value) -> list[Any] | str:
    turns = _turns(raw)
    if turns is None:
        return 'not an object with a list "conversations"'
    messages: list[Any] = []
    if isinstance(raw.get("system"), str) and raw["system"].strip():
        messages.append({"role": "system", "content": raw["system"]})
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            return f'conversations[{index}] is not an object with "from" and "value"'
        messages.append({"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")})
    return messages


def _alpaca(raw: Value) -> list[Any] | str:
    instruction, given = raw.get("instruction"), raw.get("input")
    if not isinstance(instruction, str):
        return '"instruction" is not a text'
    if isinstance(given, str) and given.strip():
        instruction = f"{instruction}\n\n{given}"
    return [*_system(raw), _message("user", instruction), _message("assistant", raw.get("output"))]


def _completion(raw: Value) -> list[Any] | str:
    prompt, completion = _first(raw, PROMPTS), _first(raw, COMPLETIONS)
    asked = prompt if isinstance(prompt, list) else [*_system(raw), _message("user", prompt)]
    answered = completion if isinstance(completion, list) else [_message("assistant", completion)]
    return [*asked, *answered]


def _preference(raw: Value) -> Value | str:
    """Chosen and rejected are texts, answers as messages, or conversations that begin with the prompt."""
    sides: list[Row] = []
    prompts: list[list[Any]] = []
    given = raw.get("prompt")
    for name in ("chosen", "rejected"):
        side = raw.get(name)
        if isinstance(side, str):
            side = [_message("assistant", side)]
        if not isinstance(side, list) or not side:
            return f'"{name}" is neither a text nor a list of messages'
        if len(side) > 1:
            prompts.append(side[:-1])
        sides.append([side[-1]])
    if isinstance(given, str):
        given = [*_system(raw), _message("user", given)]
    if not isinstance(given, list):
        if len(prompts) < 2:
            return 'there is no "prompt", and "chosen" and "rejected" are not whole conversations'
        given = prompts[0]
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        return '"chosen" and "rejected" answer different conversations'
    rows = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        checked = _checked([*given, *side])
        if isinstance(checked, str):
            return f"{name}: {checked}"
        rows.append(checked["messages"])
    chosen, rejected = rows
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        return '"chosen" and "rejected" are the same'
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(raw: Value) -> list[Any] | None:
    for name in TURNS:
        turns = raw.get(name)
        if isinstance(turns, str) and turns.lstrip().startswith("["):  # a column of CSV or parquet
            try:
                turns = orjson.loads(turns)
            except orjson.JSONDecodeError:
                continue
        if isinstance(turns, list):
            return turns
    return None


def _first(raw: Value, names: tuple[str, ...]) -> Any:
    return next((raw[name] for name in names if name in raw), None)


def _system(raw: Value) -> list[Any]:
    return [_message("system", raw["system"])] if isinstance(raw.get("system"), str) and raw["system"].strip() else []


def _message(role: str, content: Any) -> Value:
    return {"role": role, "content": content}


def with_system(value: Value, system: str | None) -> Value:
    """The row with a system message, where it brings none; texts have none."""
    name = "messages" if "messages" in value else "prompt" if "prompt" in value else None
    if system is None or name is None or value[name][0]["role"] == "system":
        return value
    return {**value, name: [_message("system", system), *value[name]]}


def asked(value: Value) -> list[str]:
    """What was said before the last answer, without system messages; of a text, the text."""
    if "text" in value:
        return [value["text"]]
    messages = value["messages"][:-1] if "messages" in value else value["prompt"]
    return [message["content"] for message in messages if message["role"] != "system"]


def answered(value: Value) -> list[str]:
    """The last answer; both of a preference pair; of a text, the text."""
    if "text" in value:
        return [value["text"]]
    if "messages" in value:
        return [value["messages"][-1]["content"]]
    return [value["chosen"][-1]["content"], value["rejected"][-1]["content"]]


def system_of(value: Value) -> str:
    messages = value.get("messages") or value.get("prompt")
    return messages[0]["content"] if messages and messages[0]["role"] == "system" else ""


def texts_of(value: Value) -> list[str]:
    """Every text of the row, system messages included."""
    if "text" in value:
        return [value["text"]]
    names = ("messages",) if "messages" in value else ("prompt", "chosen", "rejected")
    return [message["content"] for name in names for message in value[name]]


def with_texts(value: Value, texts: list[str]) -> Value:
    """The row with each text replaced, in the order of texts_of."""
    if "text" in value:
        return {"text": texts[0]}
    rest = iter(texts)
    names = ("messages",) if "messages" in value else ("prompt", "chosen", "rejected")
    return {name: [{"role": each["role"], "content": next(rest)} for each in value[name]] for name in names}
