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
from adapters.ladder import Divergence, Limits, Rung, judge_rung, read_rungs
from adapters.manifest import DataLineage, Golden, Manifest, ServingDefaults, Teacher, write_manifest
from adapters.merge import (
    MergedWeights,
    Tolerance,
    building,
    check_weights,
    combined_licence,
    merge_adapter,
    plan_updates,
)
from adapters.peft_format import load_config, lora_config
from adapters.tensors import open_tensors, save_tensors
from adapters.validation import EngineLimits, validate_adapter
from tests.factories import DTYPES, make_adapter, make_base, write_shards

Q0 = "model.layers.0.self_attn.q_proj"


def weights(base: Path, adapter: Path) -> MergedWeights:
    file = open_tensors(adapter / "adapter_model.safetensors")
    tensors = open_checkpoint(base)
    return MergedWeights(tensors, file, lora_config(load_config(adapter)), plan_updates(file, tensors))


def read_all(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: file.read(name) for name, file in open_checkpoint(folder).items()}


def figures(max_abs: float = 1e-5, mean_abs: float = 1e-6, top1: float = 1.0) -> Divergence:
    return Divergence(max_abs, mean_abs, top1)


def rung(seen: Divergence, limits: Limits) -> Rung:
    return Rung(name="saved", dtype="bfloat16", by="test", goldens=seen, limits=limits)


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
    saved = rung(figures(mean_abs=error), Tolerance().saved(figures(mean_abs=noise)))
    if error <= max(0.02, 2 * noise):
        judge_rung(saved)
    else:
        with pytest.raises(ParityError, match="saved \\(bfloat16\\)"):
            judge_rung(saved)


@pytest.mark.parametrize("bad", [figures(max_abs=0.1), figures(top1=0.9), figures(max_abs=float("nan"))])
def test_a_merge_that_differs_in_float32_is_refused(bad: Divergence) -> None:
    with pytest.raises(ParityError, match="not base"):
        judge_rung(rung(bad, Tolerance().merged()))


# Parity by weights, one tensor in memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_saved_tensor_is_within_a_last_place_of_its_exact_value(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", shards=2, dtype=dtype)
    adapter = make_adapter(tmp_path / "a", base, use_rslora=True, rank_pattern={}, scale=0.1)
    report = merge_adapter(base, adapter, tmp_path / "out", parity="weights")
    assert report.weights is not None
    assert (report.weights.changed, report.weights.kept) == (14, 6)
    assert report.weights.largest_error <= 0.51
    assert "Compared by weights: 14 changed" in (tmp_path / "out" / "README.md").read_text()
    assert read_rungs(tmp_path / "out") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "out"]


@pytest.mark.parametrize("name", [f"{Q0}.weight", "model.norm.weight"])
def test_a_saved_tensor_that_is_another_is_found(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base", dtype="float32")
    merged = weights(base, make_adapter(tmp_path / "a", base, scale=0.1))
    tensors = {each: merged.read(each, "F32") for each in merged.base}
    tensors[name] = tensors[name] * np.float32(1.001)
    out = tmp_path / "out"
    out.mkdir()
    save_tensors(out / "model.safetensors", tensors)
    with pytest.raises(ParityError, match=name):
        check_weights(merged, out)


# Interrupted, begun twice


def test_what_a_killed_merge_left_is_swept_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".out.building"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / ".scratch").mkdir()
    base = make_base(tmp_path / "base")
    merge_adapter(base, make_adapter(tmp_path / "a", base), tmp_path / "out", parity="weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "out"]
    assert not (tmp_path / "out" / ".scratch").exists()


def test_two_merges_to_one_place_do_not_disturb_each_other(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base)
    with building(tmp_path / "out") as folder:
        (folder / "mine").touch()
        with pytest.raises(MergeError, match="Another process is writing"):
            merge_adapter(base, adapter, tmp_path / "out", parity="weights")
    assert (tmp_path / "out" / "mine").is_file()


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")

    def interrupt(step: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, make_adapter(tmp_path / "a", base), tmp_path / "out", parity="weights", report=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


# What goes along


def test_the_adapters_own_template_is_the_merged_models(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base)
    own = ServingDefaults(chat_template="{{ messages[0]['content'] }}")
    write_manifest(manifest(base).model_copy(update={"serving": own}), adapter)
    report = merge_adapter(base, adapter, tmp_path / "out", parity="weights")
    assert read_base(tmp_path / "out").chat_template == own.chat_template
    assert any("template is the adapter's own" in note for note in report.notes)


def test_an_adapter_trained_over_nf4_is_merged_into_the_full_base_and_says_so(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base)
    write_manifest(manifest(base).model_copy(update={"training": {"tuning": "qlora"}}), adapter)
    merge_adapter(base, adapter, tmp_path / "out", parity="weights")
    assert "trained over the base in NF4" in (tmp_path / "out" / "README.md").read_text()
    assert "trained over the base in NF4" in (tmp_path / "out" / "merge-report.json").read_text()


def test_the_merged_models_licence_holds_the_terms_of_base_data_and_teacher(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    data = DataLineage(
        name="chats",
        digest="0" * 64,
        rows=1,
        licence="CC-BY-SA-4.0, as published",
        exceptions={"part": "MIT"},
        teacher=Teacher(name="large", licence="openai-terms"),
    )
    known = manifest(base).model_copy(update={"data": [data]})
    assert combined_licence(read_base(base), known) == "Apache-2.0 AND CC-BY-SA-4.0 AND MIT AND openai-terms"
    adapter = make_adapter(tmp_path / "a", base)
    write_manifest(known, adapter)
    merge_adapter(base, adapter, tmp_path / "out", parity="weights")
    document = json.loads((tmp_path / "out" / "merge-report.json").read_text())
    assert {"share-alike", "output-use"} <= {one["term"] for one in document["licences"]["findings"]}
    assert document["manifest"]["data"][0]["digest"] == "0" * 64
    assert read_base(tmp_path / "out").licence.endswith("openai-terms")


def test_a_trained_bias_replaces_the_bases(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, bias="lora_only")
    file = open_tensors(adapter / "adapter_model.safetensors")
    trained = np.full(32, 0.5, np.float32)
    tensors = {name: file.read(name) for name in file.tensors} | {f"base_model.model.{Q0}.base_layer.bias": trained}
    save_tensors(adapter / "adapter_model.safetensors", tensors)
    merge_adapter(base, adapter, tmp_path / "out", parity="weights")
    assert np.array_equal(read_all(tmp_path / "out")[f"{Q0}.bias"], trained.astype(DTYPES["bfloat16"]))


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


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(MergeError, match="Merge into its unquantized checkpoint"):
        merge_adapter(base, make_adapter(tmp_path / "a", base), tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_embeddings_is_refused_with_the_reason(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(tmp_path / "a", base)
    file = open_tensors(adapter / "adapter_model.safetensors")
    tensors = {name: file.read(name) for name in file.tensors} | {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 128), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((32, 4), np.float32),
    }
    save_tensors(adapter / "adapter_model.safetensors", tensors)
    with pytest.raises(MergeError, match="LoRA on the embeddings"):
        merge_adapter(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("target", ["model.embed_tokens", "lm_head"])
def test_a_whole_embedding_of_a_tied_base_is_refused_whatever_the_parity(tmp_path: Path, target: str) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(tmp_path / "a", base, modules_to_save=[target])
    file = open_tensors(adapter / "adapter_model.safetensors")
    whole = {f"base_model.model.{target}.weight": np.ones((128, 32), np.float32)}
    save_tensors(adapter / "adapter_model.safetensors", {name: file.read(name) for name in file.tensors} | whole)
    with pytest.raises(MergeError, match="tied embeddings"):
        merge_adapter(base, adapter, tmp_path / "out", parity="weights")


def test_parity_by_weights_asks_no_model_anything(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(MergeError, match="asks no model"):
        merge_adapter(
            base, make_adapter(tmp_path / "a", base), tmp_path / "out", parity="weights", prompts=tmp_path / "p.jsonl"
        )


@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"trainable_token_indices": [5]}, {"peft_type": "LOHA"}])
def test_what_the_merge_does_not_know_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(MergeError, match=next(iter(fields))):
        merge_adapter(base, make_adapter(tmp_path / "a", base, **fields), tmp_path / "out")


def biased_base(folder: Path) -> Path:
    """Like make_base, with biases on the attention's projections."""
    make_base(folder)
    tensors = read_all(folder)
    for name in list(tensors):
        if "self_attn" in name:
            tensors[name.replace(".weight", ".bias")] = np.zeros(len(tensors[name]), tensors[name].dtype)
    write_shards(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    return folder


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
    assert report.prompts == "goldens and random tokens"
    assert report.layers == 14
    assert report.fp32 is not None
    assert report.effect is not None
    assert report.fp32.max_abs < 1e-4 < report.effect.mean_abs
    rungs = read_rungs(out := tmp_path / "out")
    assert [(one.name, one.dtype) for one in rungs] == [
        ("adapter", "bfloat16"),
        ("merged", "float32"),
        ("saved", "bfloat16"),
    ]
    assert rungs[1].goldens is not None
    assert rungs[1].sample is not None
    assert (rungs[1].goldens.same_text, rungs[1].goldens.top1, rungs[1].goldens.prompts) == (1.0, 1.0, 5)
    assert rungs[1].goldens.kl is not None
    assert rungs[2].goldens is not None
    assert rungs[2].goldens.kl is not None
    assert 0 <= rungs[1].goldens.kl < 1e-7 < rungs[2].goldens.kl
    assert "merging 1/20" in steps or "merging 1/21" in steps
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
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"bias": "all"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 8}},
    ],
    ids=["rslora", "patterns", "dora", "whole head", "whole embedding", "biases", "head", "dora, rslora and patterns"],
)
def test_peft_agrees_on_every_kind_of_scale(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = biased_base(tmp_path / "base") if "bias" in options else make_base(tmp_path / "base", tied=False)
    options = {"target_modules": "all-linear"} | options
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1.2)
            elif name.endswith("bias"):
                parameter.add_(0.3)
    model.save_pretrained(tmp_path / "a")
    report = merge_adapter(base, tmp_path / "a", tmp_path / "out", dtype="float32")
    assert report.dtype == "float32"
    assert report.saved is not None
    assert report.effect is not None
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
