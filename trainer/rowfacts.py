"""How many rows a stage has and how long they are: what can be told of its data before any tokenizer is loaded."""

from pathlib import Path

from trainer.config import DataConfig, StageConfig
from trainer.data.card import BuiltDataset, read_dataset
from trainer.data.catalog import read_card
from trainer.data.training import QUESTIONS
from trainer.errors import DataError, RowFault
from trainer.estimate import RowFacts

BYTES_PER_TOKEN = 4  # of English JSON lines; other languages and code take fewer bytes a token
ANSWER_TOKENS = 40  # a question of `answer:` with its answer
ROWS_UNKNOWN = 1000


def stage_facts(stage: StageConfig, *, relative_to: Path, datasets: Path) -> tuple[RowFacts, str]:
    """(rows, tokens a row, longest row; where these figures come from). Raises DataError, FetchError.

    datasets: where fetched data sets lie; one that is not there is guessed.
    """
    if stage.data is None:
        return RowFacts(len(QUESTIONS), min(ANSWER_TOKENS, stage.max_tokens)), "the built-in questions"
    data = stage.data
    if data.folder is not None:
        return _built(read_dataset(relative_to / data.folder.expanduser()), data, stage.max_tokens)
    if data.train is not None:
        path = relative_to / data.train.expanduser()
        return _measured(path, data, stage.max_tokens), f"{path.name}, {BYTES_PER_TOKEN} bytes a token"
    folder = datasets / str(data.dataset)
    if read_card(folder) is not None:
        facts = _measured(folder / "train.jsonl", data, stage.max_tokens)
        return facts, f"{data.dataset}, {BYTES_PER_TOKEN} bytes a token"
    guess = RowFacts(data.train_rows or ROWS_UNKNOWN, stage.max_tokens // 2, stage.max_tokens)
    return guess, f"guessed: {data.dataset} is not fetched yet"


def _built(built: BuiltDataset, data: DataConfig, max_tokens: int) -> tuple[RowFacts, str]:
    part, receipt = built.card.train, built.card.receipt
    if part.tokens is None:
        facts = _measured(built.path("train"), data, max_tokens)
        return facts, f"{built.card.name}, {BYTES_PER_TOKEN} bytes a token"
    rows = min(part.rows, data.train_rows or part.rows)
    mean = min(max_tokens, max(1, part.tokens // max(1, part.rows)))
    share = receipt.trained_tokens / receipt.tokens if receipt and receipt.tokens else 1.0
    return RowFacts(rows, mean, max_tokens, share), f"{built.card.name}, counted when it was built"


def _measured(path: Path, data: DataConfig, max_tokens: int) -> RowFacts:
    """By the bytes of each line; one longer than max_tokens would be left out. Raises DataError."""
    try:
        with path.open("rb") as lines:
            lengths = [max(1, len(line) // BYTES_PER_TOKEN) for line in lines if not line.isspace()]
    except OSError as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc
    kept = [tokens for tokens in lengths if tokens <= max_tokens] or [max_tokens]
    rows = min(len(kept), data.train_rows or len(kept))
    return RowFacts(rows, max(1, round(sum(kept) / len(kept))), max(kept))
