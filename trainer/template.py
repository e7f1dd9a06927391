"""Render chat rows exactly as serving will, and mark the tokens to train on: each answer and the end of its turn.

The template is the base model's, or the one the configuration names to be served with; nothing is added to it. An answer
is what the rendering gains between the prompt that serving would send (`add_generation_prompt`) and the conversation with
the answer in it, so both renderings agree by construction; where a template does not allow that, training stops with the
row that shows it.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.chat import Row
from trainer.errors import TemplateError


@dataclass(frozen=True)
class Rendered:
    """One row in tokens. trained[i] tells whether token i counts in the loss."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def labels(self) -> list[int]:
        """-100 where nothing is to be learned, as torch's cross-entropy wants it."""
        return [token if trained else -100 for token, trained in zip(self.input_ids, self.trained, strict=True)]

    def spans(self) -> list[tuple[int, int]]:
        """[start, end) of each run of trained tokens."""
        spans: list[tuple[int, int]] = []
        start: int | None = None
        for index, trained in enumerate((*self.trained, False)):
            if trained and start is None:
                start = index
            elif not trained and start is not None:
                spans.append((start, index))
                start = None
        return spans


class ChatRenderer:
    """The base model's tokenizer and template, as vLLM uses them: rendered to text, then tokenized without additions."""

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        if not self.stop_ids:
            raise TemplateError("The base model names no end-of-turn token (eos_token_id), so nothing could stop it.")

    def text(self, messages: Row, *, prompt: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except Exception as exc:  # a template is a program: it raises what it likes
            raise TemplateError(f"The chat template refuses the messages: {exc}") from exc

    def prompt_ids(self, messages: Row) -> list[int]:
        """What the engine computes from these messages."""
        return list(self.tokenizer(self.text(messages, prompt=True), add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def render(self, row: Row) -> Rendered:
        """Raises TemplateError where training would see other tokens than serving, or never the end of a turn."""
        whole = self.text(row, prompt=False)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        starts = [start for start, _ in encoded["offset_mapping"]]
        trained = [False] * len(ids)
        for index, message in enumerate(row):
            if message["role"] != "assistant":
                continue
            before, after = self.text(row[:index], prompt=True), self.text(row[: index + 1], prompt=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise TemplateError(
                    f"The chat template renders turn {index + 1} differently once it is answered, so training and "
                    f"serving would not see the same prompt. Row: {_shorten(whole)}"
                )
            turn = [position for position, start in enumerate(starts) if len(before) <= start < len(after)]
            stops = [position for position in turn if ids[position] in self.stop_ids]
            if not stops:
                raise TemplateError(f"Turn {index + 1} does not end with an end-of-turn token. Row: {_shorten(whole)}")
            if ids[: turn[0]] != self.prompt_ids(row[:index]):
                raise TemplateError(
                    f"The prompt of turn {index + 1} has other tokens in training than in serving. Row: {_shorten(whole)}"
                )
            if self.decode(ids[turn[0] : stops[-1]]).strip() != message["content"].strip():
                raise TemplateError(f"Turn {index + 1} would not be trained whole. Row: {_shorten(whole)}")
            for position in range(turn[0], stops[-1] + 1):
                trained[position] = True
        return Rendered(tuple(ids), tuple(trained))


@dataclass(frozen=True)
class MaskReceipt:
    """Proof of what was trained on: `render` has checked each row, this shows some of them to a person."""

    rows: int
    tokens: int
    trained_tokens: int
    end_of_turn_trained: int  # answers whose end is learned: all of them, or there is no receipt
    samples: tuple[dict[str, Any], ...]


def mask_receipt(renderer: ChatRenderer, rows: Sequence[Rendered], *, samples: int = 20) -> MaskReceipt:
    """Raises TemplateError when a row trains nothing or does not train its end of turn."""
    ends = 0
    shown = []
    for number, row in enumerate(rows):
        spans = row.spans()
        if not spans or any(row.input_ids[end - 1] not in renderer.stop_ids for _, end in spans):
            raise TemplateError(
                f"Row {number + 1} does not train the end of its turn: {renderer.decode(row.input_ids)}"
            )
        ends += len(spans)
        if number < samples:
            trained = [renderer.decode(row.input_ids[start:end]) for start, end in spans]
            shown.append({"text": renderer.decode(row.input_ids), "trained": trained})
    return MaskReceipt(
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=sum(sum(row.trained) for row in rows),
        end_of_turn_trained=ends,
        samples=tuple(shown),
    )


def load_renderer(base: Path, chat_template: str | None = None) -> ChatRenderer:
    """From a model folder; reads no weights. chat_template: instead of the base's. Raises TemplateError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as exc:
        raise TemplateError(f"{base} has no tokenizer that can be read: {exc}") from exc
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if (base / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(base, local_files_only=True).eos_token_id
        stops.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return ChatRenderer(tokenizer, stops)


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
