"""The model that is trained: its base as it lies in memory, and the weights that may change. Torch lives here."""

from pathlib import Path
from typing import Any

from adapters.peft_format import load_config
from trainer.config import LoraConfig, TrainConfig

# On a CPU the fused attention's backward pass in bf16 took 30 % of a step at 100 tokens, the plain one 5 %; its memory
# grows with the square of the length.
EAGER_TOKENS = 512


def load_trainable(config: TrainConfig, base: Path, *, longest: int, start: Path | None, bare: bool = False) -> Any:
    """The base with a fresh adapter, with the one in `start` to go on with, or (tuning: full) to be trained itself.

    longest: tokens in one row. bare: without an adapter, which the trainer will add.
    """
    import torch
    from peft import PeftModel, get_peft_model

    if config.tuning == "full":
        # Master weights in float32: a step is smaller than what bfloat16 tells apart. Products are bf16 by autocast.
        return load_base(start or base, dtype=torch.float32, longest=longest)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_base(base, dtype=dtype, longest=longest, quantized=config.tuning == "qlora")
    if start is not None:
        # without is_trainable the loaded adapter is frozen, and nothing would be learned
        adapted = PeftModel.from_pretrained(model, start, is_trainable=True)
        adapted.peft_config["default"].base_model_name_or_path = str(
            base
        )  # PEFT asks the hub about any other at each save
        return adapted
    return model if bare else get_peft_model(model, peft_config(config.lora))


def load_base(folder: Path, *, dtype: Any, longest: int, quantized: bool = False) -> Any:
    """quantized: in NF4 with double quantization (Dettmers et al. 2023), computing in dtype."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if quantized and gpu:
        options["device_map"] = {"": torch.cuda.current_device()}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa" if gpu or longest > EAGER_TOKENS else "eager",
        local_files_only=True,
        **options,
    )


def peft_config(lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def lora_of(adapter: Path, default: LoraConfig) -> LoraConfig:
    """The settings of an existing adapter, in our words. Raises InvalidAdapterError."""
    raw = load_config(adapter)
    targets = raw["target_modules"]
    return LoraConfig(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", default.dropout),
        target_modules=targets if isinstance(targets, list) else "all-linear",
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
    )
