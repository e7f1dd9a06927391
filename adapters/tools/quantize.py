"""Quantize a checkpoint with llm-compressor. Runs in the environment `llmcompressor.txt` describes; imports nothing of ours.

One argument, JSON: model and out (folders), scheme (llm-compressor's name), group_size (or null), rows (a JSON lines file
with a list of token ids each, or null to round to nearest without any), max_tokens (of a row).
"""

import ctypes
import json
import signal
import sys
from typing import Any

PROGRESS = "@lorikeet "
PR_SET_PDEATHSIG = 1


def tell(step: str, done: int = 0, total: int = 0) -> None:
    sys.stdout.write(f"{PROGRESS}{json.dumps([step, done, total])}\n")
    sys.stdout.flush()


def recipe_of(asked: dict[str, Any]) -> Any:
    """GPTQ where there are rows to calibrate on, else round to nearest. The output layer stays as it is."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme = preset_name_to_scheme(asked["scheme"], ["Linear"])
    if asked["group_size"] is not None:
        scheme.weights = scheme.weights.model_copy(
            update={"strategy": "group", "group_size": asked["group_size"]}
            if asked["group_size"] > 0
            else {"strategy": "channel", "group_size": None}
        )
    modifier = GPTQModifier if asked["rows"] else QuantizationModifier
    return modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # who asked was killed: nobody wants the result
    asked = json.loads(sys.argv[1])
    tell("loading llm-compressor")
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tell("loading the checkpoint")
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"], local_files_only=True)
    calibration: dict[str, Any] = {}
    if asked["rows"]:
        with open(asked["rows"], encoding="utf-8") as file:  # noqa: PTH123
            ids = [json.loads(line) for line in file]
        rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        calibration = {
            "dataset": rows,
            "num_calibration_samples": len(ids),
            "max_seq_length": asked["max_tokens"],
            "shuffle_calibration_samples": False,
        }
    tell("quantizing")
    oneshot(model=model, processor=tokenizer, recipe=recipe_of(asked), **calibration)
    tell("saving")
    model.save_pretrained(asked["out"], save_compressed=True)
    tell("saved", 1, 1)


if __name__ == "__main__":
    main()
