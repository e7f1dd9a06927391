"""One stage of training, whatever its method: arguments, checkpoints, resuming, its figures. Torch lives here."""

import gc
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import StageConfig, TrainConfig
from trainer.errors import TrainingError
from trainer.examples import Features, sequences_of
from trainer.launch import is_main_process, processes
from trainer.methods.checkpoints import CHECKPOINTS, StageState, last_checkpoint, read_state, remove_torn
from trainer.methods.progress import Course, Report, follower
from trainer.methods.record import MetricsFile
from trainer.template import ChatRenderer

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # setting -> package


@dataclass(frozen=True)
class Stage:
    """One stage with everything it needs. number counts from 1."""

    number: int
    config: StageConfig
    whole: TrainConfig
    base: Path
    start: Path | None  # adapter (or, tuning: full, checkpoint) to go on from
    renderer: ChatRenderer
    train: Sequence[Features]
    eval: Sequence[Features]
    folder: Path  # of the stage: its checkpoints lie in it
    run: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS


@dataclass(frozen=True)
class Trained:
    """The best checkpoint, and the stage's figures."""

    best: Path
    metrics: dict[str, float]


Build = Callable[["Stage", int, dict[str, Any]], Any]


def count_steps(stage: StageConfig, rows: int, processes: int = 1) -> int:
    """Optimizer steps of the whole stage. rows: packed ones where it packs."""
    batches = math.ceil(rows / (stage.optimizer.batch_rows * processes))
    steps = math.ceil(math.ceil(batches / stage.optimizer.accumulate) * stage.optimizer.epochs)
    return min(steps, stage.optimizer.max_steps or steps)


def pack(examples: Sequence[Features], max_tokens: int) -> list[Features]:
    """Rows put together up to max_tokens (best fit, decreasing), whole; seq_lengths tells where each ends."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    return list(pack_dataset(Dataset.from_list(list(examples)), max_tokens, "bfd"))


def needs(config: TrainConfig) -> None:
    """Packages that the settings ask for. Raises TrainingError naming the missing one."""
    wanted = {"tuning: qlora": "bitsandbytes"} if config.tuning == "qlora" else {}
    if config.tracking != "none":
        wanted[f"tracking: {config.tracking}"] = TRACKERS[config.tracking]
    for setting, package in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise TrainingError(
                f"`{setting}` needs the package {package}, which is not installed: pip install {package}"
            )


def arguments(stage: Stage, steps: int) -> dict[str, Any]:
    """What every method's trainer is told alike."""
    import torch

    config, optimizer, gpu = stage.whole, stage.config.optimizer, torch.cuda.is_available()
    every = max(1, math.ceil(steps / optimizer.evaluations))
    return {
        "output_dir": str(stage.checkpoints),
        "run_name": config.name,
        "max_steps": steps,
        "per_device_train_batch_size": optimizer.batch_rows,
        "per_device_eval_batch_size": optimizer.batch_rows,
        "gradient_accumulation_steps": optimizer.accumulate,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.schedule,
        "warmup_steps": min(math.ceil(steps * optimizer.warmup_ratio), steps - 1),
        "weight_decay": optimizer.weight_decay,
        "bf16": config.precision == "bf16",  # base in bf16, LoRA and optimizer in fp32, products in bf16
        "gradient_checkpointing": config.gradient_checkpointing,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False if processes() > 1 else None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not a number is told, not smoothed over
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "disable_tqdm": True,
        "report_to": config.tracking,
    }


def train_stage(
    stage: Stage,
    build: Build,
    *,
    steps_before: int = 0,
    steps_of_all: int | None = None,
    resume: bool = False,
    report: Report = lambda progress: None,
) -> Trained:
    """Train until the end, or from the newest whole checkpoint on. Raises TrainingError.

    build: (stage, longest row in tokens, arguments) -> the method's trainer, with its model.
    """
    steps = count_steps(stage.config, len(stage.train), processes())
    last = last_checkpoint(stage.checkpoints) if resume and stage.checkpoints.is_dir() else None
    patience = stage.config.optimizer.patience
    if is_main_process():
        remove_torn(stage.checkpoints)
    if last is None or not read_state(last).ended(steps, patience):
        course = Course(steps, steps_before, steps_of_all or steps, patience)
        _train(stage, build, course, last, report)
        last = last_checkpoint(stage.checkpoints)
    if last is None:
        raise TrainingError(f"{stage.checkpoints} holds no checkpoint though training has ended. Start a new run.")
    state = read_state(last)
    _check_losses(state)
    return Trained(state.best, _figures(stage, state))


def _train(stage: Stage, build: Build, course: Course, last: Path | None, report: Report) -> None:
    import torch
    import transformers
    from transformers import PrinterCallback, ProgressCallback

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.set_seed(stage.whole.seed)
    if stage.whole.tracking == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.run / "tensorboard" / f"stage-{stage.number}")
    longest = max(length for example in stage.train for length in sequences_of(example))
    longest *= stage.config.optimizer.batch_rows if stage.config.packs else 1  # packed rows lie one behind the other
    trainer = build(stage, longest, arguments(stage, course.steps))
    trainer.add_callback(follower(report, course, MetricsFile(stage.run, stage.number)))
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.accelerator.wait_for_everyone()  # the last checkpoint counts once the first process has marked it
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_losses(state: StageState) -> None:
    if not all(map(math.isfinite, [*state.losses, *state.eval_losses])):
        raise TrainingError("The loss is not a number. Lower optimizer.learning_rate, or train with precision: fp32.")


def _figures(stage: Stage, state: StageState) -> dict[str, float]:
    losses = state.losses
    return {
        "train_loss": sum(losses) / len(losses),
        "eval_loss": min(state.eval_losses),
        "steps": float(state.step),
        "best_step": float(read_state(state.best).step),
    }
