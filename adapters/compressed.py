"""Quantized checkpoints in the compressed-tensors format, read with numpy: weights put back into floating point.

What an engine computes with such a checkpoint is its dequantized weights and, where the scheme says so, activations rounded
token by token; both can be done in float32 anywhere, which is how parity is measured on machines whose kernels do not run the
scheme.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adapters.base import open_checkpoint
from adapters.errors import QuantizeError
from adapters.tensors import TensorFile, TensorInfo, TensorSpec, write_tensors

Rounding = Literal["int8", "float8"]
FORMATS = ("pack-quantized", "int-quantized", "float-quantized")
PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's linear layers are stored, and what happens to their inputs."""

    format: str
    bits: int
    activations: Rounding | None  # each token's inputs rounded to 8 bits by their own largest value; None: kept


def read_scheme(folder: Path) -> Scheme:
    """From config.json. Raises QuantizeError for a checkpoint that is not quantized, or in a way that is not read here."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not config:
        raise QuantizeError(f"{folder} is not quantized.")
    groups = config.get("config_groups") or {}
    if config.get("quant_method") != "compressed-tensors" or len(groups) != 1:
        raise QuantizeError(f"{folder}: only compressed-tensors checkpoints with one group of layers are read.")
    group = next(iter(groups.values()))
    stored = group.get("format") or config.get("format")
    weights, inputs = group["weights"], group.get("input_activations")
    if stored not in FORMATS or not weights.get("symmetric", True) or weights["num_bits"] not in (4, 8):
        raise QuantizeError(
            f"{folder}: weights stored as {stored} with {weights['num_bits']} bits (symmetric: "
            f"{weights.get('symmetric')}) are not read."
        )
    rounding: Rounding | None = None
    if inputs is not None:
        if inputs["num_bits"] != 8 or inputs["strategy"] != "token" or not inputs["dynamic"]:
            raise QuantizeError(f"{folder}: activations other than 8 bits, dynamic by token, are not read.")
        rounding = "int8" if inputs["type"] == "int" else "float8"
    return Scheme(stored, int(weights["num_bits"]), rounding)


def quantized_modules(tensors: Mapping[str, TensorFile]) -> list[str]:
    """Layers that have a scale beside their weight, in the checkpoint's order of names."""
    return sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale"))


def dequantize(module: str, tensors: Mapping[str, TensorFile], scheme: Scheme) -> NDArray[np.float32]:
    """The layer's weight, [out_features, in_features]: each group of inputs (or the whole row) times its scale."""

    def read(part: str) -> NDArray[Any]:
        name = f"{module}.{part}"
        if name not in tensors:
            raise QuantizeError(f"'{name}' is missing from the checkpoint.")
        return tensors[name].read(name)

    if scheme.format == "pack-quantized":
        rows, columns = (int(size) for size in read("weight_shape"))
        values = unpack(read("weight_packed"), scheme.bits, columns).astype(np.float32)
    else:
        values = read("weight").astype(np.float32)
        rows, columns = values.shape
    scale = read("weight_scale").astype(np.float32).reshape(rows, -1)
    if columns % scale.shape[1]:
        raise QuantizeError(f"'{module}' has {scale.shape[1]} scales for {columns} inputs, which does not divide.")
    groups = values.reshape(rows, scale.shape[1], -1)
    weight: NDArray[np.float32] = (groups * scale[:, :, None]).reshape(rows, columns)
    return weight


def unpack(words: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """Signed integers of 4 or 8 bits, stored with an offset, the lowest bits of each word first.

    words: [rows, ceil(columns · bits / 32)]. Returns [rows, columns].
    """
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(words), -1)
    return (stored[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def write_dequantized(folder: Path, out: Path) -> Scheme:
    """The checkpoint with its layers in float32, ready for any loader, in `out`, which is made. Copies no tokenizer.

    Raises QuantizeError for what `read_scheme` does not read.
    """
    scheme, tensors = read_scheme(folder), open_checkpoint(folder)
    modules = set(quantized_modules(tensors))
    if not modules:
        raise QuantizeError(f"{folder} says that it is quantized, but no layer has a scale.")
    out.mkdir(parents=True)
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in _kept(tensors, modules)]
    specs += [TensorSpec(f"{module}.weight", "F32", _shape(module, tensors, scheme)) for module in sorted(modules)]

    def produce(name: str) -> NDArray[Any]:
        module = name.removesuffix(".weight")
        return dequantize(module, tensors, scheme) if module in modules else tensors[name].read(name)

    write_tensors(out / "model.safetensors", specs, produce, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return scheme


def round_activations(model: Any, modules: list[str], rounding: Rounding) -> None:
    """Let each of the torch model's layers round its inputs first, as an engine's kernels do.

    Each token's values are divided by its largest magnitude over 127 (int8) or 448 (float8 e4m3), rounded, and put back.
    """
    import torch

    def rounded(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values = inputs[0]
        most = 127.0 if rounding == "int8" else 448.0
        scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / most
        small = values / scale
        small = small.round() if rounding == "int8" else small.to(torch.float8_e4m3fn).to(values.dtype)
        return (small * scale, *inputs[1:])

    layers = dict(model.named_modules())
    for module in modules:
        layers[module].register_forward_pre_hook(rounded)


def _kept(tensors: Mapping[str, TensorFile], modules: set[str]) -> list[TensorInfo]:
    """Tensors that no layer's quantized weight consists of."""
    found = []
    for name, file in sorted(tensors.items()):
        module, _, part = name.rpartition(".")
        if module not in modules or part not in (*PARTS, "weight"):
            found.append(file.tensors[name])
    return found


def _shape(module: str, tensors: Mapping[str, TensorFile], scheme: Scheme) -> tuple[int, ...]:
    if scheme.format == "pack-quantized":
        name = f"{module}.weight_shape"
        return tuple(int(size) for size in tensors[name].read(name))
    return tensors[f"{module}.weight"].tensors[f"{module}.weight"].shape
