"""Checkpoints: which are whole, and when training has ended."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trainer.methods.checkpoints import (
    StageState,
    evaluations_since_best,
    last_checkpoint,
    mark_complete,
    read_state,
    remove_torn,
)


def save(folder: Path, step: int, **state: object) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    raw = {"global_step": step, "log_history": [], "best_model_checkpoint": None, **state}
    (checkpoint / "trainer_state.json").write_text(json.dumps(raw))
    return checkpoint


def test_a_checkpoint_that_was_being_written_is_neither_used_nor_kept(tmp_path: Path) -> None:
    whole, torn = save(tmp_path, 9), save(tmp_path, 12)
    mark_complete(whole)
    assert last_checkpoint(tmp_path) == whole
    remove_torn(tmp_path)
    assert (whole.exists(), torn.exists()) == (True, False)


def test_the_newest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        mark_complete(save(tmp_path, step))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_the_best_is_found_where_the_run_lies_now(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "now", 4, best_model_checkpoint="/before/checkpoint-2")
    assert read_state(checkpoint).best == tmp_path / "now" / "checkpoint-2"


@given(losses=st.lists(st.floats(0, 10), max_size=20), patience=st.integers(1, 5))
def test_patience_ends_training_once_that_many_evaluations_were_no_better(losses: list[float], patience: int) -> None:
    waited = evaluations_since_best(losses)
    assert losses == [] or min(losses) == losses[len(losses) - 1 - waited]
    state = StageState(3, tuple({"eval_loss": loss} for loss in losses), Path())
    assert state.ended(10, patience) == (waited >= patience)
    assert state.ended(3, None)
    assert not state.ended(4, None)
