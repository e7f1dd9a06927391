"""An adapter as factor pairs: each layer's update ΔW = B·A with the scale inside; added up, cut to a rank, written for PEFT.

numpy alone, one layer at a time; no matrix of a layer's whole size is ever formed.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseModelInfo
from adapters.errors import MergeError
from adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, load_config, lora_config, parse_tensor_name
from adapters.tensors import open_tensors, save_tensors


@dataclass(frozen=True)
class Factors:
    """One layer's update B·A. a: [rank, in_features], b: [out_features, rank], float32."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def read_factors(adapter: Path) -> dict[str, Factors]:
    """Module -> its update. Raises MergeError for an adapter that is more than LoRA on linear layers."""
    config = lora_config(load_config(adapter))
    weights = open_tensors(adapter / WEIGHTS_FILE)
    sides: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name in weights.tensors:
        parsed = parse_tensor_name(name)
        if parsed is None or config.dora:
            raise MergeError(
                f"{adapter.name} holds {name}: only LoRA and rsLoRA on linear layers are sums of low-rank updates."
            )
        sides.setdefault(parsed.module, {})[parsed.side] = weights.read(name).astype(np.float32)
    return {
        module: Factors(pair["A"], pair["B"] * np.float32(config.scale_of(module))) for module, pair in sides.items()
    }


def add_up(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """The weighted sum of updates, exactly: factors side by side, ranks added. The weight's root goes to each side."""
    roots = [(np.sign(weight) * abs(weight) ** 0.5, abs(weight) ** 0.5) for weight, _ in parts]
    return Factors(
        np.concatenate(
            [np.float32(root) * factors.a for (root, _), (_, factors) in zip(roots, parts, strict=True)], axis=0
        ),
        np.concatenate(
            [np.float32(root) * factors.b for (_, root), (_, factors) in zip(roots, parts, strict=True)], axis=1
        ),
    )


def cut(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest update of at most this rank (Eckart and Young 1936), and how far it is, as a share of the update's norm.

    Singular values of B·A are those of R_B·R_Aᵀ, of the two QR decompositions: [rank, rank].
    """
    outer, right = np.linalg.qr(factors.b.astype(np.float64))
    inner, left = np.linalg.qr(factors.a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(right @ left.T)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    nearest = Factors(
        (root[:, None] * (vt[:kept] @ inner.T)).astype(np.float32),
        ((outer @ u[:, :kept]) * root).astype(np.float32),
    )
    whole = float(np.sum(values**2))
    return nearest, float(np.sqrt(np.sum(values[kept:] ** 2) / whole)) if whole else 0.0


def write_factors(folder: Path, factors: Mapping[str, Factors], info: BaseModelInfo) -> None:
    """adapter_config.json and adapter_model.safetensors of a plain LoRA whose scale is 1 (alpha = rank), in bfloat16."""
    rank = Counter(each.rank for each in factors.values()).most_common(1)[0][0]
    others = {module: each.rank for module, each in sorted(factors.items()) if each.rank != rank}
    tensors: dict[str, NDArray[Any]] = {}
    for module, each in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = each.a.astype(ml_dtypes.bfloat16)
        tensors[f"base_model.model.{module}.lora_B.weight"] = each.b.astype(ml_dtypes.bfloat16)
    save_tensors(folder / WEIGHTS_FILE, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.fingerprint.model,
        "revision": info.fingerprint.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": _targets(factors, info),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _targets(factors: Mapping[str, Factors], info: BaseModelInfo) -> list[str]:
    """Last names where they mean exactly these layers, else whole names."""
    last = {module.rsplit(".", 1)[-1] for module in factors}
    meant = {module for module in info.modules if module.rsplit(".", 1)[-1] in last}
    return sorted(last if meant == set(factors) else factors)
