"""Rows with known answers: how often a model's greedy text is exactly the answer, before something was done to it and after.

For data whose answers are short, such as topics or extracted values. Longer texts have no one right answer, and no score here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.calibration import EVAL_FILE, MAX_TOKENS, load_tokenizer, sample_rows
from adapters.errors import QuantizeError
from adapters.ladder import TaskScore

ROWS = 64
LEAST_ROWS = 8


@dataclass(frozen=True)
class Task:
    """Prompts in token ids, each with the text it is to be answered with."""

    source: str
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]

    def compare(self, before: Sequence[str], after: Sequence[str]) -> TaskScore:
        """Of two models' texts, one a prompt each; white space around them does not count."""
        scores = [
            sum(text.strip() == answer for text, answer in zip(texts, self.answers, strict=True)) / len(self.answers)
            for texts in (before, after)
        ]
        return TaskScore(source=self.source, rows=len(self.prompts), before=scores[0], after=scores[1])


def find_task(
    given: Path | None, data: Path | None, checkpoint: Path, *, context_tokens: int, answer_tokens: int
) -> Task | None:
    """The task of `given`; else that of the held-out rows of `data`, if they have one; else none.

    given, data: a data set's folder or a JSON lines file of chats ({"messages": […]}) that end with the answer.
    Raises QuantizeError when `given` has no such rows with answers of at most `answer_tokens`.
    """
    path = given or data
    file = path / EVAL_FILE if path is not None and path.is_dir() else given
    if file is None or not file.is_file():
        if given is not None:
            raise QuantizeError(f"{given} is neither a JSON lines file nor a folder with {EVAL_FILE}.")
        return None
    tokenizer = load_tokenizer(checkpoint)
    rows = [row["messages"] for row in sample_rows(file, ROWS, seed=0) if "messages" in row]
    found = [
        (prompt, messages[-1]["content"].strip())
        for messages in rows
        if messages[-1]["role"] == "assistant"
        and len(tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]) < answer_tokens
        and len(prompt := _prompt(tokenizer, messages[:-1])) + answer_tokens <= min(MAX_TOKENS, context_tokens)
    ]
    if len(found) < LEAST_ROWS:
        if given is not None:
            raise QuantizeError(
                f"{file} has {len(found)} chats that end with an answer of fewer than {answer_tokens} tokens; a score needs "
                f"{LEAST_ROWS}."
            )
        return None
    return Task(f"{file.parent.name}/{file.name}", *(tuple(part) for part in zip(*found, strict=True)))


def _prompt(tokenizer: Any, messages: Sequence[Any]) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
