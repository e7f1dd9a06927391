"""Supervised fine-tuning over TRL: loss on answers only; and continual pre-training, for which every token is one."""

from typing import Any

from trainer.methods.model import load_trainable
from trainer.methods.stage import Stage


def sft_trainer(stage: Stage, longest: int, arguments: dict[str, Any]) -> Any:
    """TRL's trainer over rows that are rendered, masked and, where the stage packs, packed already."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig

    from trainer.methods.trainers import AnswersOnlyTrainer, LorikeetTrainer

    packs = stage.config.packs
    # where every token is an answer there is nothing to save, and TRL's loss needs less memory
    kind = LorikeetTrainer if torch.cuda.is_available() or stage.config.method == "pretrain" else AnswersOnlyTrainer
    return kind(
        model=load_trainable(stage.whole, stage.base, longest=longest, start=stage.start),
        args=SFTConfig(
            max_length=None,  # rows that are too long were left out, never cut
            padding_free=packs,
            train_sampling_strategy="random" if packs else "group_by_length",
            **arguments,
        ),
        train_dataset=Dataset.from_list(list(stage.train)),
        eval_dataset=Dataset.from_list(list(stage.eval)),
        processing_class=stage.renderer.tokenizer,
    )
