"""Rows of training data as token ids, for a quantizer to calibrate on.

A data set folder (`lorikeet data build`, `data fetch`) or a JSON lines file with chat rows ({"messages": [...]}), texts
({"text": ...}) or preference pairs ({"prompt": [...], "chosen": [...]}), rendered with the checkpoint's own template.
"""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.errors import QuantizeError

MAX_TOKENS = 1024  # of a row; of longer ones the beginning
MIN_TOKENS = 8
TRAIN_FILE, EVAL_FILE = "train.jsonl", "eval.jsonl"


def read_calibration(data: Path, checkpoint: Path, *, rows: int, context_tokens: int, seed: int = 0) -> list[list[int]]:
    """A sample of the training rows, at most `rows`. Raises QuantizeError for data that cannot be read or holds none."""
    path = training_file(data)
    tokenizer = load_tokenizer(checkpoint)
    longest = min(MAX_TOKENS, context_tokens)
    rendered = (_row_ids(row, tokenizer) for row in sample_rows(path, rows, seed))
    found = [ids[:longest] for ids in rendered if len(ids) >= MIN_TOKENS]
    if not found:
        raise QuantizeError(f"{path} holds no row of at least {MIN_TOKENS} tokens to calibrate on.")
    return found


def training_file(data: Path) -> Path:
    """Raises QuantizeError when `data` is neither a file nor the folder of a data set."""
    path = data if data.is_file() else data / TRAIN_FILE
    if not path.is_file():
        raise QuantizeError(f"{data} is neither a JSON lines file nor a folder with {TRAIN_FILE}.")
    return path


def held_out_file(data: Path | None) -> Path | None:
    """A data set's evaluation rows, whose prompts nobody calibrated on; None where there are none."""
    path = data / EVAL_FILE if data is not None else None
    return path if path is not None and path.is_file() and path.stat().st_size else None


def load_tokenizer(checkpoint: Path) -> Any:
    """Raises QuantizeError when the checkpoint has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise QuantizeError(f"{checkpoint} has no tokenizer that can be loaded: {exc}") from exc


def sample_rows(path: Path, count: int, seed: int) -> list[Mapping[str, Any]]:
    """`count` rows, each as likely as any other, in random order; the file is read once, in little memory."""
    rng = random.Random(seed)  # noqa: S311 - a sample, no secret
    kept: list[str] = []
    for number, line in enumerate(_lines(path)):
        if len(kept) < count:
            kept.append(line)
        elif (place := rng.randrange(number + 1)) < count:
            kept[place] = line
    rng.shuffle(kept)
    return [_parse(path, line) for line in kept]


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line


def _parse(path: Path, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise QuantizeError(f"{path} is not JSON lines: {exc} in {line[:80]!r}") from exc
    if not isinstance(row, dict) or not ("messages" in row or "text" in row or {"prompt", "chosen"} <= row.keys()):
        raise QuantizeError(f'{path}: a row needs "messages", "text", or "prompt" and "chosen"; found {line[:80]!r}')
    return row


def _row_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    try:
        if "text" in row:
            text = row["text"]
        else:
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as exc:  # a template is a program: it raises what it likes
        raise QuantizeError(f"The chat template refuses a row: {exc}") from exc
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
