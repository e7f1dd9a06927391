"""What one stage learns from, in tokens: its rows read, rendered as serving will render them, and counted."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapters.manifest import DataLineage, Teacher
from trainer.config import DataConfig, StageConfig, TrainConfig
from trainer.data.card import BuiltDataset, Preference, file_sha256, read_dataset
from trainer.data.chat import Row, row_fault, with_system_prompt
from trainer.data.splits import choose_rows
from trainer.data.training import HELD_OUT, Fetch, TrainingData, golden_rows, load_training_data
from trainer.errors import DataError, RowFault, TrainingError
from trainer.template import ChatRenderer, MaskReceipt, Rendered, mask_receipt

Features = dict[str, list[int]]  # one example: input_ids and labels, or prompt_ids, chosen_ids and rejected_ids
Item = TypeVar("Item")
ANSWERS = ("chosen_ids", "rejected_ids")
PAIR = ("prompt", "chosen", "rejected")
PROMPT_WORDS = 40  # of a text's beginning, asked as a chat, for the goldens of raw text


@dataclass(frozen=True)
class Examples:
    """train and eval: in tokens. prompts: held-out conversations whose last turn is an answer, for goldens."""

    train: list[Features]
    eval: list[Features]
    left_out: int  # training rows longer than max_tokens
    prompts: list[Row]
    lineage: tuple[DataLineage, ...]
    receipt: MaskReceipt | None = None  # of chat rows: raw text is trained on whole, pairs on their answers

    @property
    def trained_tokens(self) -> int:
        """Tokens of one epoch that count in the loss."""
        return sum(map(_trained, self.train))


def sequences_of(example: Features) -> list[int]:
    """Lengths in tokens of what goes through the model: one sequence, or the two of a pair, each with its prompt."""
    if "input_ids" in example:
        return [len(example["input_ids"])]
    return [len(example["prompt_ids"]) + len(example[answer]) for answer in ANSWERS]


def _trained(example: Features) -> int:
    if "labels" in example:
        return sum(label != -100 for label in example["labels"])
    return sum(len(example[answer]) for answer in ANSWERS)


def load_examples(
    stage: StageConfig, config: TrainConfig, renderer: ChatRenderer, *, relative_to: Path, fetch: Fetch
) -> Examples:
    """Raises DataError, FetchError, ConfigError, TemplateError, TrainingError when no row is left."""
    load = {"sft": _chat, "pretrain": _text, "dpo": _pairs}[stage.method]
    examples = load(stage, config, renderer, relative_to, fetch)
    for name, part in (("training", examples.train), ("evaluation", examples.eval)):
        if not part:
            raise TrainingError(
                f"No {name} row is left: every one is longer than max_tokens={stage.max_tokens}, or there was none. "
                "Raise max_tokens, shorten the rows, or add some."
            )
    return examples


def _chat(stage: StageConfig, config: TrainConfig, renderer: ChatRenderer, relative_to: Path, fetch: Fetch) -> Examples:
    data = stage.data
    if data is not None and data.folder is not None:
        built = read_dataset(relative_to / data.folder.expanduser())
        built.check_digests()
        rows = choose_rows(list(built.chat_rows("train")), data.train_rows, balanced=data.balanced)
        held = choose_rows(list(built.chat_rows("eval")), data.eval_rows, balanced=data.balanced)
        found = TrainingData(rows, held, _lineage(built))
    else:
        # the loader of chat rows knows one stage only: the file's own
        whole = config.model_copy(update={"data": stage.data, "answer": stage.answer, "stages": ()})
        found = load_training_data(whole, relative_to=relative_to, fetch=fetch)
    complete = partial(with_system_prompt, prompt=config.serving.system_prompt)
    train = render_rows(renderer, map(complete, found.train), max_tokens=stage.max_tokens)
    held_out = list(map(complete, found.eval))
    evaluation = render_rows(renderer, held_out, max_tokens=stage.max_tokens)
    return Examples(
        [chat_features(row) for row in train],
        [chat_features(row) for row in evaluation],
        len(found.train) - len(train),
        golden_rows(held_out, config.goldens),
        found.lineage,
        mask_receipt(renderer, train) if train else None,
    )


def render_rows(renderer: ChatRenderer, rows: Iterable[Row], *, max_tokens: int) -> list[Rendered]:
    """In tokens, without those that are too long. Raises TemplateError."""
    return [row for row in map(renderer.render, rows) if len(row.input_ids) <= max_tokens]


def chat_features(row: Rendered) -> Features:
    return {"input_ids": list(row.input_ids), "labels": row.labels()}


def _text(stage: StageConfig, config: TrainConfig, renderer: ChatRenderer, relative_to: Path, fetch: Fetch) -> Examples:
    train, held_out, lineage = _rows(stage.data, config.seed, relative_to, BuiltDataset.texts, _parse_text)
    cut = partial(cut_text, renderer, max_tokens=stage.max_tokens)
    prompts = [row for row in map(text_as_chat, held_out) if row]
    complete = [with_system_prompt(row, config.serving.system_prompt) for row in prompts]
    return Examples(
        [piece for text in train for piece in cut(text)],
        [piece for text in held_out for piece in cut(text)],
        0,
        golden_rows(complete, config.goldens),
        lineage,
    )


def cut_text(renderer: ChatRenderer, text: str, *, max_tokens: int) -> list[Features]:
    """The text's tokens with the end-of-text token behind them, in pieces of max_tokens, all of them trained on."""
    ids = [*renderer.tokenizer(text, add_special_tokens=False)["input_ids"], renderer.tokenizer.eos_token_id]
    pieces = [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]  # one token predicts nothing


def text_as_chat(text: str) -> Row:
    """A text's beginning as a user's turn: how what was learned from raw text is served. Empty for very short ones."""
    words = text.split()
    if len(words) < 4:
        return []
    asked = min(PROMPT_WORDS, len(words) // 2)
    return [
        {"role": "user", "content": " ".join(words[:asked])},
        {"role": "assistant", "content": " ".join(words[asked : asked + PROMPT_WORDS])},
    ]


def _pairs(
    stage: StageConfig, config: TrainConfig, renderer: ChatRenderer, relative_to: Path, fetch: Fetch
) -> Examples:
    train, held_out, lineage = _rows(stage.data, config.seed, relative_to, BuiltDataset.preferences, _parse_pair)
    prompt = config.serving.system_prompt
    features = [pair_features(renderer, pair, system_prompt=prompt) for pair in train]
    kept = [pair for pair in features if max(sequences_of(pair)) <= stage.max_tokens]
    evaluation = [pair_features(renderer, pair, system_prompt=prompt) for pair in held_out]
    rows = [with_system_prompt([*pair.prompt, *pair.chosen], prompt) for pair in held_out]
    return Examples(
        kept,
        [pair for pair in evaluation if max(sequences_of(pair)) <= stage.max_tokens],
        len(features) - len(kept),
        golden_rows(rows, config.goldens),
        lineage,
    )


def pair_features(renderer: ChatRenderer, pair: Preference, *, system_prompt: str | None) -> Features:
    """The prompt as serving sends it, and both answers up to and including their end of turn. Raises TemplateError."""
    prompt = with_system_prompt(list(pair.prompt), system_prompt)
    ids = renderer.prompt_ids(prompt)
    answers = {}
    for name, answer in zip(ANSWERS, (pair.chosen, pair.rejected), strict=True):
        rendered = renderer.render([*prompt, *answer])
        _, end = rendered.spans()[-1]
        answers[name] = list(rendered.input_ids[len(ids) : end])
    return {"prompt_ids": ids, **answers}


def _rows(
    data: DataConfig | None,
    seed: int,
    relative_to: Path,
    of_built: Callable[[BuiltDataset, Any], Iterable[Item]],
    parse: Callable[[Any], Item],
) -> tuple[list[Item], list[Item], tuple[DataLineage, ...]]:
    """(train, eval, lineage) of a built folder or of files of one's own."""
    assert data is not None  # noqa: S101 - the configuration has been validated
    if data.folder is not None:
        built = read_dataset(relative_to / data.folder.expanduser())
        built.check_digests()
        train, held_out, lineage = list(of_built(built, "train")), list(of_built(built, "eval")), _lineage(built)
    else:
        assert data.train is not None  # noqa: S101
        path = relative_to / data.train.expanduser()
        train = read_own(path, parse)
        if data.eval is not None:
            held_out = read_own(relative_to / data.eval.expanduser(), parse)
        else:
            train, held_out = hold_out(train, seed=seed)
        lineage = (
            DataLineage(
                name=path.name,
                digest=file_sha256(path),
                rows=min(len(train), data.train_rows or len(train)),
                licence=data.licence,
                source="a file of one's own",
            ),
        )
    return train[: data.train_rows], held_out[: data.eval_rows], lineage


def hold_out(rows: Sequence[Item], *, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, eval): a tenth is held out, at least one row."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - a reproducible order, no secret
    count = max(1, round(len(shuffled) * HELD_OUT))
    return shuffled[count:], shuffled[:count]


def read_own(path: Path, parse: Callable[[Any], Item]) -> list[Item]:
    """Every row of a JSONL file; blank lines are skipped. Raises DataError naming each bad line.

    parse: raises ValueError with what is wrong.
    """
    rows: list[Item] = []
    faults: list[RowFault] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(parse(json.loads(line)))
                except json.JSONDecodeError as exc:
                    faults.append(RowFault(number, f"not JSON: {exc.msg} at column {exc.colno}"))
                except ValueError as exc:
                    faults.append(RowFault(number, str(exc)))
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc
    if not rows and not faults:
        faults.append(RowFault(0, "holds no rows"))
    if faults:
        raise DataError(path, faults)
    return rows


def _parse_text(value: Any) -> str:
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('not an object with a "text" that is not empty')
    return text


def _parse_pair(value: Any) -> Preference:
    if not isinstance(value, dict) or not all(isinstance(value.get(name), list) for name in PAIR):
        raise ValueError(f"not an object with lists of messages {', '.join(PAIR)}")
    for answer in ("chosen", "rejected"):
        fault = row_fault({"messages": [*value["prompt"], *value[answer]]})
        if fault is not None or not value[answer]:
            raise ValueError(f"prompt and {answer}: {fault or 'there is no answer'}")
    return Preference(value["prompt"], value["chosen"], value["rejected"])


def _lineage(built: BuiltDataset) -> tuple[DataLineage, ...]:
    return tuple(
        DataLineage(
            name=source.name,
            digest=source.sha256,
            rows=source.rows,
            licence=source.licence,
            source=f"data set {built.card.name}, train {built.card.train.sha256}",
            exceptions=source.exceptions,
            teacher=Teacher(name=source.teacher.name, licence=source.teacher.licence) if source.teacher else None,
        )
        for source in built.card.sources
    )
