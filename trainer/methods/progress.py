"""Where a run is: what the trainer's log says, as one value that commands and workers show, and a record of it on disk."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.methods.checkpoints import evaluations_since_best, mark_complete
from trainer.methods.record import Metrics, MetricsFile


@dataclass(frozen=True)
class Progress:
    """Where a run is. Losses and accuracy are NaN until first measured."""

    step: int
    steps: int
    loss: float
    eval_loss: float
    tokens_per_s: float
    token_accuracy: float = math.nan  # share of the trained tokens that were the most likely one, in the last step
    checkpoint: Path | None = None  # set in the one report that follows its saving


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Course:
    """The stage being trained, among the steps of the whole run."""

    steps: int  # of this stage
    steps_before: int  # of the stages before it
    steps_of_all: int
    patience: int | None


def follower(report: Report, course: Course, record: MetricsFile) -> Any:
    """A transformers callback: log entries become Progress and lines of metrics, checkpoints are marked, patience ends."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class Follower(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loss = self.eval_loss = self.accuracy = math.nan
            self.began_s = self.spent_s = self.speed = 0.0

        def seconds(self) -> float:
            return self.spent_s + time.monotonic() - self.began_s

        def tell(self, step: int, checkpoint: Path | None = None) -> None:
            report(
                Progress(
                    course.steps_before + step,
                    course.steps_of_all,
                    self.loss,
                    self.eval_loss,
                    self.speed,
                    self.accuracy,
                    checkpoint,
                )
            )

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began_s = time.monotonic()
            if state.is_world_process_zero:
                self.spent_s = record.begin(state.global_step)
                self.tell(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
                return
            self.loss = logs.get("loss", self.loss)
            self.eval_loss = logs.get("eval_loss", self.eval_loss)
            self.accuracy = logs.get("mean_token_accuracy", self.accuracy)
            trained = "loss" in logs
            if trained:
                self.speed = logs.get("num_tokens", 0.0) / max(time.monotonic() - self.began_s, 1e-9)
            record.add(
                Metrics(
                    record.stage,
                    state.global_step,
                    round(self.seconds(), 4),
                    loss=logs.get("loss"),
                    eval_loss=logs.get("eval_loss"),
                    learning_rate=logs.get("learning_rate"),
                    tokens=round(logs["num_tokens"]) if "num_tokens" in logs and trained else None,
                    tokens_per_s=round(self.speed, 1) if trained else None,
                    token_accuracy=logs.get("mean_token_accuracy"),
                    eval_token_accuracy=logs.get("eval_mean_token_accuracy"),
                )
            )
            self.tell(state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
            if course.patience is not None and evaluations_since_best(losses) >= course.patience:
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            mark_complete(checkpoint)
            self.tell(state.global_step, checkpoint)

    return Follower()
