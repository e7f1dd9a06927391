"""Merging: W₀ + scale·B·A to the last digit, everything else kept, and nothing left behind when it is not equal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import open_checkpoint, read_base
from adapters.errors import MergeError, ParityError
from adapters.manifest import DataLineage, Golden, Manifest, write_manifest
from adapters.merge import MergedWeights, ParityReport, Tolerance, judge, merge_adapter, plan_updates
from adapters.parity import Divergence
from adapters.peft_format import load_config, lora_config
from adapters.tensors import open_tensors, save_tensors
from adapters.validation import EngineLimits, validate_adapter
from tests.factories import make_adapter, make_base, write_shards

Q0 = "model.layers.0.self_attn.q_proj"


def weights(base: Path, adapter: Path) -> MergedWeights:
    file = open_tensors(adapter / "adapter_model.safetensors")
    tensors = open_checkpoint(base)
    return MergedWeights(tensors, file, lora_config(load_config(adapter)), plan_updates(file, tensors))


def read_all(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: file.read(name) for name, file in open_checkpoint(folder).items()}


def figures(max_abs: float = 1e-5, mean_abs: float = 1e-6, top1: float = 1.0) -> Divergence:
    return Divergence(max_abs, mean_abs, top1)


def result(fp32: Divergence, saved: Divergence, unmerged: Divergence) -> ParityReport:
    return ParityReport("out", "base", "0" * 64, 14, "bfloat16", "goldens", 100, fp32, saved, unmerged, figures(1.0))


# The arithmetic, without torch


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_layer_is_base_plus_scaled_product(tmp_path: Path, rslora: bool) -> None:
    base = make_base(tmp_path / "base", dtype="float32")
    adapter = make_adapter(
        tmp_path / "a", base, use_rslora=rslora, alpha_pattern={"k_proj": 2.0}, targets=["q_proj", "k_proj"]
    )
    merged, file = weights(base, adapter), open_tensors(adapter / "adapter_model.safetensors")
    original = read_all(base)
    for module, alpha in ((Q0, 8.0), (Q0.replace("q_proj", "k_proj"), 2.0)):
        a, b = (file.read(f"base_model.model.{module}.lora_{side}.weight").astype(np.float64) for side in "AB")
        expected = original[f"{module}.weight"] + alpha / (2.0 if rslora else 4.0) * b @ a
        assert np.allclose(merged.read(f"{module}.weight", "F32"), expected, rtol=0, atol=1e-6)


def test_what_the_adapter_does_not_touch_is_kept_bit_for_bit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    merged = weights(base, make_adapter(tmp_path / "a", base, targets=["q_proj"]))
    for name, tensor in read_all(base).items():
        same = np.array_equal(merged.read(name, "BF16"), tensor)
        assert same is ("q_proj" not in name)


def test_small_updates_survive_since_the_cast_comes_last(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, targets=["q_proj"], scale=0.002)
    merged = weights(base, adapter)
    exact = merged.read(f"{Q0}.weight", "F32").astype(np.float64)
    cast = merged.read(f"{Q0}.weight", "BF16").astype(np.float64)
    assert np.abs(cast - exact).max() <= np.abs(exact).max() * 2**-8


def test_a_merge_that_overflows_its_dtype_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="float32")
    tensors = read_all(base)
    tensors[f"{Q0}.weight"] *= np.float32(1e6)
    write_shards(base, tensors)
    merged = weights(base, make_adapter(tmp_path / "a", base))
    with pytest.raises(MergeError, match="not finite in F16"):
        merged.read(f"{Q0}.weight", "F16")


@given(error=st.floats(0, 1), noise=st.floats(0, 0.05))
def test_the_saved_model_is_judged_by_the_noise_of_its_dtype(error: float, noise: float) -> None:
    report = result(figures(), figures(mean_abs=error), figures(mean_abs=noise))
    if error <= max(0.02, 2 * noise):
        judge(report, Tolerance())
    else:
        with pytest.raises(ParityError, match="saved in bfloat16"):
            judge(report, Tolerance())


@pytest.mark.parametrize("bad", [figures(max_abs=0.1), figures(top1=0.9), figures(max_abs=float("nan"))])
def test_a_merge_that_differs_in_float32_is_refused(bad: Divergence) -> None:
    with pytest.raises(ParityError, match="float32"):
        judge(result(bad, figures(), figures()), Tolerance())


# What cannot be merged, decided before torch is loaded


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(MergeError, match="exists already"):
        merge_adapter(base, make_adapter(tmp_path / "a", base), base)


def test_an_adapter_of_other_weights_is_refused(tmp_path: Path) -> None:
    base, twin = make_base(tmp_path / "base"), make_base(tmp_path / "twin", seed=1)
    adapter = make_adapter(tmp_path / "a", twin)
    write_manifest(manifest(twin), adapter)
    with pytest.raises(MergeError, match="trained on tests/Tiny-Llama with weights"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"trainable_token_indices": [5]}, {"peft_type": "LOHA"}])
def test_what_the_merge_does_not_know_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(MergeError, match=next(iter(fields))):
        merge_adapter(base, make_adapter(tmp_path / "a", base, **fields), tmp_path / "out")


def test_a_whole_tensor_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(tmp_path / "a", base, modules_to_save=["lm_head"])
    file = open_tensors(adapter / "adapter_model.safetensors")
    tensors = {name: file.read(name) for name in file.tensors}
    tensors["base_model.model.lm_head.weight"] = np.ones((128, 32), np.float32)
    save_tensors(adapter / "adapter_model.safetensors", tensors)
    with pytest.raises(MergeError, match="tied embeddings"):
        merge_adapter(base, adapter, tmp_path / "out")


def manifest(base: Path, goldens: int = 0) -> Manifest:
    golden = Golden(
        messages=[],
        completion="",
        prompt_token_ids=[1, 17, 30],
        completion_token_ids=[9, 40, 2],
        logprobs=[-1.0] * 3,
        base_logprobs=[-2.0] * 3,
    )
    return Manifest(
        name="support",
        base=read_base(base).fingerprint,
        rank=4,
        alpha=8,
        target_modules=["q_proj"],
        created_at=1,
        base_licence="Apache-2.0",
        data=[DataLineage(name="tickets", digest="0" * 64, rows=320, licence="CC-BY-4.0")],
        goldens=[golden] * goldens,
    )


# The whole way, with PEFT as the judge


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_equals_base_plus_adapter_and_can_be_served(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", shards=2, tied=tied)
    adapter = make_adapter(tmp_path / "a", base, scale=0.1)
    write_manifest(manifest(base, goldens=5), adapter)
    steps: list[str] = []
    report = merge_adapter(
        base, adapter, tmp_path / "out", report=lambda step, done, total: steps.append(f"{step} {done}/{total}")
    )
    assert report.prompts == "goldens"
    assert report.layers == 14
    assert report.fp32.max_abs < 1e-4 < report.effect.mean_abs
    assert "merging 1/20" in steps or "merging 1/21" in steps
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in base.glob("*.safetensors")}
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    merged, original = read_base(out), read_base(base)
    assert merged.fingerprint.weights_digest != original.fingerprint.weights_digest
    assert merged.fingerprint.template_digest == original.fingerprint.template_digest
    assert merged.modules.keys() == original.modules.keys()
    card = (out / "README.md").read_text()
    assert "CC-BY-4.0" in card
    assert "Apache-2.0" in card
    assert "Together: ok." in card
    assert "carry: name the source, its licence and what was changed" in card
    assert report.adapter_digest in card
    assert json.loads((out / "merge-report.json").read_text())["fp32"]["top1"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "patterns", "dora", "whole modules"],
)
def test_peft_agrees_on_every_kind_of_scale(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", tied=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1.2)
    model.save_pretrained(tmp_path / "a")
    report = merge_adapter(base, tmp_path / "a", tmp_path / "out", dtype="float32")
    assert report.dtype == "float32"
    assert report.saved.max_abs < 1e-4 < report.effect.mean_abs


@pytest.mark.slow
def test_a_merge_outside_the_tolerance_leaves_nothing_behind(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, scale=0.1)
    with pytest.raises(ParityError, match="not kept"):
        merge_adapter(base, adapter, tmp_path / "out", tolerance=Tolerance(fp32_max=0.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.slow
def test_a_merged_model_is_a_base_for_further_adapters(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    merge_adapter(base, make_adapter(tmp_path / "a", base), tmp_path / "out")
    second = make_adapter(tmp_path / "b", tmp_path / "out", seed=1)
    assert validate_adapter(second, read_base(tmp_path / "out"), EngineLimits(16)).rank == 4
