"""Checkpoints of a stage: which are whole, which is the newest, which the best, and whether training had ended with it.

A checkpoint is taken for whole once our mark lies in it: a process killed while saving leaves a folder that looks like one.
What a stage came to is read from the newest one's own state, so a resumed run tells the same as an undisturbed one.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import TrainingError

CHECKPOINTS = "checkpoints"
MARK = "complete"
STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class StageState:
    """What the newest checkpoint tells of its stage."""

    step: int
    log: tuple[Mapping[str, Any], ...]
    best: Path  # checkpoint with the lowest eval loss

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log if "loss" in entry]

    @property
    def eval_losses(self) -> list[float]:
        return [entry["eval_loss"] for entry in self.log if "eval_loss" in entry]

    def ended(self, steps: int, patience: int | None) -> bool:
        return self.step >= steps or (patience is not None and evaluations_since_best(self.eval_losses) >= patience)


def evaluations_since_best(losses: Sequence[float]) -> int:
    """How many of the last evaluations did not lower the loss."""
    if not losses:
        return 0
    return len(losses) - 1 - min(range(len(losses)), key=losses.__getitem__)


def mark_complete(checkpoint: Path) -> None:
    (checkpoint / MARK).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole one."""
    whole = {int(match[1]): path for path, match in _named(folder) if (path / MARK).is_file()}
    return whole[max(whole)] if whole else None


def remove_torn(folder: Path) -> None:
    """Those that were being written when their process ended; while nobody writes any."""
    for path, _ in _named(folder):
        if not (path / MARK).is_file():
            shutil.rmtree(path)


def _named(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("checkpoint-*"))
    return [(path, match) for path, match in found if match is not None]


def read_state(checkpoint: Path) -> StageState:
    """Raises TrainingError."""
    path = checkpoint / STATE_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        best = raw.get("best_model_checkpoint")
        return StageState(
            step=int(raw["global_step"]),
            log=tuple(raw["log_history"]),
            best=checkpoint.parent / Path(best).name if best else checkpoint,  # the run may have been moved
        )
    except (OSError, ValueError, KeyError) as exc:
        raise TrainingError(
            f"{path} cannot be read: {exc}. Remove {checkpoint} and resume from the one before."
        ) from exc
