"""Compressed checkpoints put back: what was packed comes out, and activations are rounded as an engine rounds them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from adapters.base import open_checkpoint
from adapters.compressed import Scheme, dequantize, quantized_modules, read_scheme, unpack, write_dequantized
from adapters.errors import QuantizeError
from adapters.tensors import DTYPES, open_tensors, save_tensors
from tests.factories import make_base

Q0 = "model.layers.0.self_attn.q_proj"
FORMATS = {"pack-quantized": 4, "int-quantized": 8, "float-quantized": 8}


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Reference, bit by bit: value i of a row takes bits i·b and up of the row, with an offset."""
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns * bits // 32)), np.uint32)
    for (row, column), value in np.ndenumerate(values):
        at = column * bits
        words[row, at // 32] |= np.uint32((int(value) + (1 << (bits - 1))) << (at % 32))
    return words.view(np.int32)


def quantize(weight: NDArray[Any], stored: str, groups: int) -> dict[str, NDArray[Any]]:
    """Round to nearest, a scale for each group of inputs; tensor parts as compressed-tensors names them."""
    bits, (rows, columns) = FORMATS[stored], weight.shape
    grouped = weight.astype(np.float32).reshape(rows, groups, -1)
    most = 448.0 if stored == "float-quantized" else 2 ** (bits - 1) - 1
    scale = np.abs(grouped).max(-1) / most
    values = grouped / scale[:, :, None]
    parts: dict[str, NDArray[Any]] = {"weight_scale": scale.astype(np.float32)}
    if stored == "float-quantized":
        return parts | {"weight": values.reshape(rows, columns).astype(DTYPES["F8_E4M3"])}
    whole = values.round().astype(np.int8).reshape(rows, columns)
    if stored == "int-quantized":
        return parts | {"weight": whole}
    return parts | {"weight_packed": pack(whole, bits), "weight_shape": np.array([rows, columns], np.int64)}


def make_quantized(folder: Path, stored: str, groups: int = 1, activations: dict[str, Any] | None = None) -> Path:
    """The tiny base with every linear layer quantized."""
    make_base(folder)
    file = open_tensors(folder / "model.safetensors")
    tensors: dict[str, NDArray[Any]] = {}
    for name in file.tensors:
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            parts = quantize(file.read(name), stored, groups)
            tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            tensors[name] = file.read(name)
    save_tensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": FORMATS[stored], "symmetric": True}
    group = {"format": stored, "weights": weights, "input_activations": activations, "targets": ["Linear"]}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@given(
    bits=st.sampled_from([4, 8]),
    values=arrays.arrays(np.int8, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.integers(-8, 7)),
)
def test_what_was_packed_comes_out(bits: int, values: NDArray[np.int8]) -> None:
    assert np.array_equal(unpack(pack(values, bits), bits, values.shape[1]), values)


@pytest.mark.parametrize(("stored", "groups", "off"), [("pack-quantized", 4, 0.08), ("int-quantized", 1, 0.005)])
def test_a_layers_weight_is_put_back_within_half_a_step(tmp_path: Path, stored: str, groups: int, off: float) -> None:
    original = open_tensors(make_base(tmp_path / "base") / "model.safetensors").read(f"{Q0}.weight")
    folder = make_quantized(tmp_path / "q", stored, groups)
    tensors = open_checkpoint(folder)
    weight = dequantize(Q0, tensors, read_scheme(folder))
    wide = original.astype(np.float32)
    step = tensors[f"{Q0}.weight_scale"].read(f"{Q0}.weight_scale").max()
    assert np.abs(weight - wide).max() <= step / 2 * 1.001
    assert np.abs(weight - wide).max() / np.abs(wide).max() < off


@pytest.mark.parametrize("stored", FORMATS)
def test_a_quantized_checkpoint_becomes_one_that_any_loader_reads(tmp_path: Path, stored: str) -> None:
    base = open_checkpoint(make_base(tmp_path / "base"))
    folder = make_quantized(tmp_path / "q", stored, 2 if stored == "pack-quantized" else 1)
    write_dequantized(folder, tmp_path / "out")
    back = open_checkpoint(tmp_path / "out")
    assert back.keys() == base.keys()
    for name, file in base.items():
        changed = name.removesuffix(".weight") in quantized_modules(open_checkpoint(folder))
        assert back[name].tensors[name].shape == file.tensors[name].shape
        assert np.array_equal(back[name].read(name), file.read(name)) is not changed
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_scheme_tells_how_activations_are_rounded(tmp_path: Path) -> None:
    tokens = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    folder = make_quantized(tmp_path / "q", "int-quantized", activations=tokens)
    assert read_scheme(folder) == Scheme("int-quantized", 8, "int8")


@pytest.mark.parametrize(
    ("activations", "words"),
    [
        ({"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}, "other than 8 bits"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}, "other than 8 bits"),
    ],
)
def test_a_scheme_that_is_not_read_is_refused(tmp_path: Path, activations: dict[str, Any], words: str) -> None:
    folder = make_quantized(tmp_path / "q", "int-quantized", activations=activations)
    with pytest.raises(QuantizeError, match=words):
        read_scheme(folder)
    with pytest.raises(QuantizeError, match="is not quantized"):
        read_scheme(make_base(tmp_path / "base"))


@pytest.mark.slow
@pytest.mark.parametrize(("rounding", "step"), [("int8", 1 / 127), ("float8", 32 / 448)])
def test_activations_are_rounded_by_each_tokens_largest(rounding: Any, step: float) -> None:
    import torch

    from adapters.compressed import round_activations

    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
    round_activations(model, ["0"], rounding)
    tokens = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0], [0.01]])
    apart = (model(tokens) - tokens).abs() / tokens.abs().amax(-1, keepdim=True)
    assert 0 < apart.max() <= step / 2 * 1.01
    assert (apart.amax(-1) > step / 8).all()  # the large token's step is not the small one's
