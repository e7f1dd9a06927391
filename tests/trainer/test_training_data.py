"""The rows of a run: where they come from, how many steps they make, which become goldens."""

from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainConfig
from trainer.data.chat import write_rows
from trainer.data.sources import chat_row
from trainer.data.training import golden_rows, load_training_data
from trainer.errors import DataError, TrainingError
from trainer.examples import load_examples
from trainer.methods.stage import count_steps
from trainer.template import load_renderer


def settings(**changes: Any) -> TrainConfig:
    optimizer = {"epochs": 2, "max_steps": 6, "batch_rows": 4}
    return TrainConfig.model_validate({"name": "own", "answer": "Yes.", "optimizer": optimizer, **changes})


@pytest.mark.parametrize(("rows", "steps"), [(4, 2), (5, 4), (400, 6)])
def test_steps_are_counted_before_the_run(rows: int, steps: int) -> None:
    assert count_steps(settings(), rows) == steps


def test_rows_that_are_all_too_long_are_an_error(tokenizer_folder: Path) -> None:
    config = settings(max_tokens=9)
    with pytest.raises(TrainingError, match="max_tokens=9"):
        load_examples(config, config, load_renderer(tokenizer_folder), relative_to=tokenizer_folder, fetch=Path)


def test_ones_own_file_is_deduplicated_and_split(tmp_path: Path) -> None:
    rows = [chat_row("s", f"question {number % 20}", "yes") for number in range(25)]
    write_rows(tmp_path / "mine.jsonl", rows)
    config = settings(answer=None, data={"train": "mine.jsonl", "licence": "CC0-1.0"})
    data = load_training_data(config, relative_to=tmp_path, fetch=lambda name: tmp_path)
    assert (len(data.train), len(data.eval)) == (18, 2)
    assert data.lineage[0].licence == "CC0-1.0"
    assert len(data.lineage[0].digest) == 64


def test_a_faulty_own_file_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"messages": []}\n')
    config = settings(answer=None, data={"train": "mine.jsonl"})
    with pytest.raises(DataError, match=r"mine.jsonl:1: .*empty"):
        load_training_data(config, relative_to=tmp_path, fetch=lambda name: tmp_path)


def test_goldens_show_different_answers() -> None:
    rows = [chat_row("s", f"q{number}", label) for number, label in enumerate("aaaaabc")]
    assert {row[-1]["content"] for row in golden_rows(rows, 3)} == {"a", "b", "c"}
