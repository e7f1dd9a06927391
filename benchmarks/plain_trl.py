"""A training script as TRL's documentation has it, with a stopwatch: what `benchmarks.training` compares ours with.

    python -m benchmarks.plain_trl SETTINGS.json FIGURES.json

Settings: base, rows (JSONL of messages), and the numbers of the run; figures: tokens and seconds at each step's end.
The adapter is saved beside the figures.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as ours does, or the machine's other work decides the comparison


def main(settings_file: Path, figures_file: Path) -> None:
    began = time.monotonic()
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = json.loads(settings_file.read_text(encoding="utf-8"))
    steps: list[tuple[int, float, float]] = []

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                steps.append((int(logs["num_tokens"]), time.monotonic(), logs["loss"]))

    data = load_dataset("json", data_files={"train": settings["rows"]}, split="train")
    data = data.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
    )
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(figures_file.parent / "plain"),
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_rows"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=1,
            bf16=True,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length",
            logging_steps=1,
            save_strategy="steps",
            save_steps=settings["steps"],
            report_to="none",
            disable_tqdm=True,
            seed=0,
            data_seed=0,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
        peft_config=LoraConfig(
            r=settings["r"], lora_alpha=settings["alpha"], lora_dropout=settings["dropout"], target_modules="all-linear"
        ),
        callbacks=[Stopwatch()],
    )
    trainer.train()
    document = {"steps": steps, "whole_s": time.monotonic() - began}
    trainer.save_model(str(figures_file.with_suffix("")))
    figures_file.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
