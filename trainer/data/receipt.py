"""Built rows as the model will see them: how many tokens, which are trained, and whether serving would see the same."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from trainer.data.card import Receipt, ReceiptSample
from trainer.data.chat import Row, with_system_prompt
from trainer.data.formats import Value
from trainer.template import ChatRenderer, load_renderer

SHOWN = 20
CHECKED = 1000  # rows rendered and compared one by one, half a millisecond each; training compares all of them


@dataclass(frozen=True)
class Rendering:
    """How rows will be rendered."""

    base: str
    folder: Path
    chat_template: str | None
    system_prompt: str | None

    def load(self) -> ChatRenderer:
        """Raises TemplateError."""
        return load_renderer(self.folder, self.chat_template)


def conversations(value: Value, system_prompt: str | None) -> list[Row]:
    """The conversations a row makes: one, or for a preference pair that with each answer."""
    if "messages" in value:
        return [with_system_prompt(value["messages"], system_prompt)]
    return [with_system_prompt([*value["prompt"], *value[name]], system_prompt) for name in ("chosen", "rejected")]


class TokenCounter:
    """Counts tokens of written rows, in one process."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering = rendering
        self._renderer = rendering.load()

    def count(self, lines: Sequence[bytes]) -> int:
        """Raises TemplateError."""
        texts: list[str] = []
        for value in map(orjson.loads, lines):
            if "text" in value:
                texts.append(value["text"])
            else:
                rows = conversations(value, self._rendering.system_prompt)
                texts += [self._renderer.text(row, prompt=False) for row in rows]
        if not texts:
            return 0
        return sum(map(len, self._renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]))


def mask_receipt_of(values: Iterable[Value], rendering: Rendering) -> Receipt:
    """Render each row as training does, which fails where its prompt is not what serving computes.

    Raises TemplateError with the row that training would refuse.
    """
    renderer = rendering.load()
    template = rendering.chat_template or renderer.tokenizer.chat_template or ""
    rows = tokens = trained = ends = equal = 0
    samples: list[ReceiptSample] = []
    for value in values:
        rows += 1
        for row in conversations(value, rendering.system_prompt):
            rendered = renderer.render(row)
            whole = renderer.text(row, prompt=False).encode()
            for index, message in enumerate(row):
                if message["role"] == "assistant":
                    equal += whole.startswith(renderer.text(row[:index], prompt=True).encode())
            spans = rendered.spans()
            ends += sum(rendered.input_ids[end - 1] in renderer.stop_ids for _, end in spans)
            tokens += len(rendered.input_ids)
            trained += sum(rendered.trained)
            if len(samples) < SHOWN:
                shown = tuple(renderer.decode(rendered.input_ids[start:end]) for start, end in spans)
                samples.append(ReceiptSample(text=renderer.decode(rendered.input_ids), trained=shown))
    return Receipt(
        base=rendering.base,
        template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        rows=rows,
        tokens=tokens,
        trained_tokens=trained,
        end_of_turn_trained=ends,
        prompts_equal=equal,
        samples=tuple(samples),
    )
