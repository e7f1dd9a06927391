"""Where a run is: what the trainer's log says, as one value that commands and workers show."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def follower(report: Report, steps: int, tokens_per_step: float) -> Any:
    """A transformers callback that turns the trainer's log entries and checkpoints into Progress."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class Follower(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loss = self.eval_loss = self.accuracy = math.nan
            self.begun: tuple[int, float] = (0, time.monotonic())
            self.speed = 0.0

        def tell(self, step: int, checkpoint: Path | None = None) -> None:
            report(Progress(step, steps, self.loss, self.eval_loss, self.speed, self.accuracy, checkpoint))

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = (state.global_step, time.monotonic())  # a resumed run begins where it stopped
            self.tell(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            self.loss = logs.get("loss", self.loss)
            self.eval_loss = logs.get("eval_loss", self.eval_loss)
            self.accuracy = logs.get("mean_token_accuracy", self.accuracy)
            step, at = self.begun
            self.speed = (state.global_step - step) * tokens_per_step / max(time.monotonic() - at, 1e-9)
            self.tell(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.tell(state.global_step, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    return Follower()
