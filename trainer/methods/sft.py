"""Supervised fine-tuning of a LoRA over TRL: loss on answers only, best checkpoint kept, resumable. Torch lives here."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.methods.progress import Report, follower
from trainer.template import ChatRenderer, Rendered

CHECKPOINTS = "checkpoints"
# On a CPU the fused attention's backward pass in bf16 took 30 % of a step at 100 tokens, the plain one 5 %; its memory
# grows with the square of the length.
EAGER_TOKENS = 512


@dataclass(frozen=True)
class Trained:
    """A PEFT model holding the best checkpoint's weights, and the run's figures."""

    model: Any
    metrics: dict[str, float]


def count_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = math.ceil(math.ceil(rows / config.optimizer.batch_rows) / config.optimizer.accumulate)
    steps = math.ceil(per_epoch * config.optimizer.epochs)
    return min(steps, config.optimizer.max_steps or steps)


def train_sft(
    config: TrainConfig,
    base: Path,
    renderer: ChatRenderer,
    train: Sequence[Rendered],
    evaluation: Sequence[Rendered],
    run: Path,
    *,
    resume: bool = False,
    report: Report = lambda progress: None,
) -> Trained:
    """Train in `run`, where checkpoints lie. Raises TrainingError."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig, SFTTrainer

    from trainer.methods.losses import AnswersOnlyTrainer

    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(config.seed)
    checkpoints = run / CHECKPOINTS
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if resume and last is None:
        raise TrainingError(f"{run} holds no checkpoint to resume from. Start it again without --resume.")
    steps = count_steps(config, len(train))
    every = max(1, math.ceil(steps / config.optimizer.evaluations))
    gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        attn_implementation="sdpa" if gpu or config.max_tokens > EAGER_TOKENS else "eager",
        local_files_only=True,
    )
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=config.optimizer.batch_rows,
        per_device_eval_batch_size=config.optimizer.batch_rows,
        gradient_accumulation_steps=config.optimizer.accumulate,
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type=config.optimizer.schedule,
        warmup_steps=math.ceil(steps * config.optimizer.warmup_ratio),
        weight_decay=config.optimizer.weight_decay,
        bf16=config.precision == "bf16",  # base in bf16, LoRA and optimizer in fp32, products in bf16
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        max_length=None,  # rows that are too long were left out, never cut
        train_sampling_strategy="group_by_length",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
        report_to="none",
    )
    tokens_per_step = sum(len(row.input_ids) for row in train) / len(train)
    tokens_per_step *= config.optimizer.batch_rows * config.optimizer.accumulate
    trainer = (SFTTrainer if gpu else AnswersOnlyTrainer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([_features(row) for row in train]),
        eval_dataset=Dataset.from_list([_features(row) for row in evaluation]),
        processing_class=renderer.tokenizer,
        peft_config=LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            use_rslora=config.lora.rslora,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        callbacks=[follower(report, steps, tokens_per_step)],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    outcome = trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not math.isfinite(outcome.training_loss) or not losses or not math.isfinite(min(losses)):
        raise TrainingError("The loss is not a number. Lower optimizer.learning_rate, or train with precision: fp32.")
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    metrics = {
        "train_loss": outcome.training_loss,
        "eval_loss": min(losses),
        "steps": float(trainer.state.global_step),
        "seconds": round(seconds, 1),
        "trainable_parameters": float(trainable),
    }
    return Trained(trainer.model, metrics)


def _features(row: Rendered) -> dict[str, list[int]]:
    return {"input_ids": list(row.input_ids), "labels": row.labels()}
