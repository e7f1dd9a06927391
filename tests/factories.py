"""Small real parts for tests: a tiny Llama-architecture base and PEFT adapters for it, made in milliseconds."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseModelInfo, BaseSpec, describe_base, read_base, write_base
from adapters.tensors import save_tensors

DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(
    folder: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 64,
    vocab: int = 128,
    context_tokens: int = 512,
    tied: bool = True,
    dtype: str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    name: str = "Tiny-Llama",
    template: str = TEMPLATE,
) -> Path:
    """A checkpoint that transformers and PEFT can load, with its lorikeet-base.json. It has no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    head_dim = hidden // heads

    def matrix(rows: int, columns: int, std: float = 0.05) -> NDArray[Any]:
        return rng.normal(0, std, (rows, columns)).astype(DTYPES[dtype])

    tensors: dict[str, NDArray[Any]] = {
        "model.embed_tokens.weight": matrix(vocab, hidden, 0.5),
        "model.norm.weight": np.ones(hidden, DTYPES[dtype]),
    }
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 0.5)
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for module, (rows, columns) in shapes.items():
            tensors[f"{prefix}.{module}.weight"] = matrix(rows, columns, 0.2)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(hidden, DTYPES[dtype])
    write_shards(folder, tensors, shards)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": context_tokens,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": dtype,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_json(folder / "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    spec = BaseSpec(name=name, model=f"tests/{name}", licence="Apache-2.0", folder=folder)
    write_base(folder, describe_base(folder, spec))
    return folder


def write_shards(folder: Path, tensors: Mapping[str, NDArray[Any]], shards: int = 1) -> None:
    """One model.safetensors, or several with their index."""
    if shards == 1:
        save_tensors(folder / "model.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def adapter_tensors(
    base: BaseModelInfo,
    *,
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.02,
    targets: Sequence[str] = TARGETS,
    dtype: str = "float32",
) -> dict[str, NDArray[Any]]:
    """The tensors of a LoRA on every layer of `base` whose last name is in `targets`. `scale` is the spread of B."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    for module, info in base.modules.items():
        if module.rsplit(".", 1)[-1] in targets:
            a = rng.normal(0, info.in_features**-0.5, (rank, info.in_features))
            b = rng.normal(0, scale, (info.out_features, rank))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(DTYPES[dtype])
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(DTYPES[dtype])
    return tensors


def adapter_config(
    base: BaseModelInfo, *, rank: int = 4, alpha: float = 8, targets: Sequence[str] = TARGETS, **fields: Any
) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it; `fields` override."""
    return {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "auto_mapping": None,
        "peft_version": "0.21.2",
        "base_model_name_or_path": base.fingerprint.model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "target_modules": sorted(targets),
        "exclude_modules": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
        "trainable_token_indices": None,
        **fields,
    }


def make_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    scale: float = 0.02,
    targets: Sequence[str] = TARGETS,
    dtype: str = "float32",
    **fields: Any,
) -> Path:
    """A valid PEFT LoRA folder for the base; `fields` override adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    info = read_base(base)
    tensors = adapter_tensors(info, rank=rank, seed=seed, scale=scale, targets=targets, dtype=dtype)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    _write_json(folder / "adapter_config.json", adapter_config(info, rank=rank, alpha=alpha, targets=targets, **fields))
    return folder


def zip_folder(folder: Path, *, top: str = "") -> bytes:
    """The folder's files as a zip archive, under a top folder if one is named."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, str(Path(top) / path.relative_to(folder)))
    return buffer.getvalue()


def tar_folder(folder: Path, *, top: str = "", gz: bool = False) -> bytes:
    """The folder's files as a tar or tar.gz archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gz else "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, str(Path(top) / path.relative_to(folder)))
    return buffer.getvalue()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
