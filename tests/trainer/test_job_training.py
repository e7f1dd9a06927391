"""The real training of a job: killed and started again, further from an adapter, and what fails."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.trainer.fresh import Fresh
from trainer.job import DONE, FAILED, JOB_FILE, STOPPED, JobSpec
from trainer.journal import JournalReader

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


def make_folder(folder: Path, base: Path, rows: Sequence[object], method: str = "supervised") -> Path:
    folder.mkdir()
    (folder / "training_file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = JobSpec(
        id="ftjob-1",
        adapter="topics",
        base=str(base),
        base_slug="tiny",
        home=folder,
        method=method,
        hyperparameters={"n_epochs": 4, "batch_size": 2},
        seed=3,
        engine="test",
    )
    (folder / JOB_FILE).write_text(spec.model_dump_json())
    return folder


ROWS = [{"prompt": f"question {number}", "completion": f"answer {number % 3}"} for number in range(12)]


def start(folder: Path) -> Fresh:
    return Fresh("trainer.job", [str(folder)], log=folder / "log.txt")


def keys(folder: Path) -> list[str]:
    return [entry.key for entry in JournalReader(folder).news()]


def ended(process: Fresh) -> int:
    code = process.wait(180)
    process.stdin.close()
    if code not in (DONE, FAILED, STOPPED, -signal.SIGKILL):
        pytest.fail(f"exit code {code}: {process.said()}")
    return code


def wait_for(folder: Path, key: str, *, times: int = 1) -> None:
    for _ in range(2400):
        if keys(folder).count(key) >= times:
            return
        time.sleep(0.05)
    pytest.fail(f"no {key} in {keys(folder)}: {(folder / 'log.txt').read_text()[-3000:]}")


def test_killed_twice_and_stopped_once_it_ends_like_an_undisturbed_one(tiny_base: Path, tmp_path: Path) -> None:
    whole = make_folder(tmp_path / "whole", tiny_base, ROWS)
    assert ended(start(whole)) == DONE
    broken = make_folder(tmp_path / "broken", tiny_base, ROWS)

    killed = start(broken)
    wait_for(broken, "step:2")
    killed.kill()
    assert ended(killed) == -signal.SIGKILL

    orphaned = start(broken)
    wait_for(broken, "checkpoint:6")
    orphaned.stdin.close()  # what a killed worker leaves
    assert orphaned.wait(60) == -signal.SIGKILL

    stopped = start(broken)
    wait_for(broken, "phase:training", times=3)
    stopped.send_signal(signal.SIGTERM)
    code = ended(stopped)
    while code == STOPPED:
        code = ended(start(broken))
    assert code == DONE
    for name in ("adapter", *(path.name for path in whole.glob("checkpoint-*"))):
        assert (broken / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes(), name
    assert {*keys(broken)} == {*keys(whole)}
    told = {entry.key: entry.data for entry in JournalReader(whole).news()}
    for entry in JournalReader(broken).news():
        if entry.kind in ("step", "evaluated"):
            assert entry.data == told[entry.key]


def test_preferences_are_learned_on_top_of_an_adapter(tiny_base: Path, tmp_path: Path) -> None:
    first = make_folder(tmp_path / "first", tiny_base, ROWS)
    assert ended(start(first)) == DONE
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": f"question {number}"}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for number in range(12)
    ]
    second = make_folder(tmp_path / "second", tiny_base, pairs, "dpo")
    (first / "adapter").rename(second / "further")
    assert ended(start(second)) == DONE
    *_, last = JournalReader(second).news()
    assert last.kind == "finished"
    assert (second / "adapter" / WEIGHTS).read_bytes() != (second / "further" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in (second / "adapter").iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "manifest.json",
    ]


def test_rows_that_cannot_be_learned_from_fail_it_with_their_line(tiny_base: Path, tmp_path: Path) -> None:
    wrong = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    folder = make_folder(tmp_path / "wrong", tiny_base, [good, wrong])
    assert ended(start(folder)) == FAILED
    *_, last = JournalReader(folder).news()
    assert (last.kind, last.data["code"], last.data["line"]) == ("failed", "invalid_training_file", 2)
    assert os.fspath(tmp_path) not in last.data["message"]
