"""The child that trains: what it makes of the files it is given, and what it says of what goes wrong."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import DataError, RowFault, TrainingError
from trainer.job import JobSpec, Listener, StopAskedError, WrongFileError, convert, failure, prepare
from trainer.journal import Journal, JournalReader
from trainer.methods.progress import Progress

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = "\n".join(["", json.dumps(CHAT), "", json.dumps(CHAT), ""])
    (tmp_path / "training_file.jsonl").write_text(rows)
    return tmp_path


def spec(folder: Path, **changes: Any) -> JobSpec:
    raw = {
        "id": "ftjob-1",
        "adapter": "topics",
        "base": "tiny",
        "base_slug": "tiny",
        "home": folder,
        "method": "supervised",
        "hyperparameters": {"n_epochs": "auto"},
        "seed": 1,
    }
    return JobSpec.model_validate(raw | changes)


def test_the_trainers_file_has_every_row_and_no_blank_line(folder: Path) -> None:
    assert convert(folder, "training_file") == 2
    assert [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()] == [CHAT, CHAT]


def test_a_configuration_is_settled_once_and_kept(folder: Path) -> None:
    journal = Journal(folder)
    first = prepare(spec(folder), folder, journal)
    again = prepare(spec(folder, hyperparameters={"n_epochs": 9}), folder, journal)
    assert again == first
    assert first.optimizer.epochs == 3


def test_a_file_that_is_none_is_told_with_parameter_and_line(folder: Path) -> None:
    (folder / "validation_file.jsonl").write_text(json.dumps(CHAT) + "\n{}\n")
    with pytest.raises(WrongFileError) as wrong:
        prepare(spec(folder), folder, Journal(folder))
    told = failure(wrong.value, folder)
    assert (told["code"], told["param"], told["line"]) == ("invalid_validation_file", "validation_file", 2)


def test_a_row_that_cannot_be_learned_is_told_by_the_line_its_owner_wrote(folder: Path) -> None:
    convert(folder, "training_file")
    wrong = DataError(folder / "train.jsonl", [RowFault(2, "the last message is not the assistant's")])
    assert failure(wrong, folder) == {
        "code": "invalid_training_file",
        "message": "Line 4: the last message is not the assistant's",
        "param": "training_file",
        "line": 4,
    }
    whole = failure(DataError(folder / "train.jsonl", [RowFault(0, "holds no rows")]), folder)
    assert (whole["message"], whole["line"]) == ("holds no rows", None)


def test_no_path_and_no_inner_error_is_told_to_the_owner(folder: Path) -> None:
    told = failure(TrainingError(f"{folder}/run holds no checkpoint, says {folder}"), folder)
    assert str(folder) not in told["message"]
    assert (told["code"], told["param"]) == ("training_failed", None)
    assert "secret" not in failure(ValueError("secret"), folder)["message"]


def progress(step: int, *, loss: float = 1.0, eval_loss: float = math.nan, checkpoint: Path | None = None) -> Progress:
    return Progress(step, 10, loss, eval_loss, 100.0, 0.5, checkpoint)


def test_each_step_is_told_once_and_an_evaluation_when_it_is_new(folder: Path) -> None:
    listener = Listener(folder, Journal(folder), threading.Event(), step=2)
    for report in (
        progress(2, loss=math.nan),  # what a resumed run begins with
        progress(3),
        progress(3, eval_loss=2.0),
        progress(4, eval_loss=2.0),
        progress(5, eval_loss=1.5),
    ):
        listener.listen("training", report)
    assert [entry.key for entry in JournalReader(folder).news()] == [
        "step:3",
        "evaluated:3",
        "step:4",
        "step:5",
        "evaluated:5",
    ]


def test_who_is_asked_to_stop_does_so_where_nothing_is_lost(folder: Path) -> None:
    stop = threading.Event()
    listener = Listener(folder, Journal(folder), stop, step=0)
    (folder / "checkpoint-2").mkdir()  # exported already
    stop.set()
    with pytest.raises(StopAskedError):
        Listener(folder, Journal(folder), stop, step=0).listen("reading data", None)
    listener.listen("training", progress(1))
    with pytest.raises(StopAskedError):
        listener.listen("training", progress(2, checkpoint=folder / "run" / "checkpoints" / "checkpoint-2"))
