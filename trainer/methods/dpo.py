"""Direct preference optimization (Rafailov et al. 2023) of an adapter over TRL. Torch lives here.

What the adapter is held to is where it began: for a fresh one the base, computed with the adapter switched off; for one that
is gone on with a frozen copy of it, which TRL keeps under the name "ref" and saves in a folder below each checkpoint. Nobody
but a resumed run reads that folder: exporting takes the adapter itself.
"""

from typing import Any

from trainer.methods.model import load_trainable, peft_config
from trainer.methods.stage import Stage


def dpo_trainer(stage: Stage, longest: int, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig

    from trainer.methods.trainers import PairsTrainer

    fresh = stage.start is None and stage.whole.tuning != "full"
    return PairsTrainer(
        model=load_trainable(stage.whole, stage.base, longest=longest, start=stage.start, bare=fresh),
        peft_config=peft_config(stage.whole.lora) if fresh else None,
        args=DPOConfig(max_length=None, beta=stage.config.beta, **arguments),
        train_dataset=Dataset.from_list(list(stage.train)),
        eval_dataset=Dataset.from_list(list(stage.eval)),
        processing_class=stage.renderer.tokenizer,
    )
