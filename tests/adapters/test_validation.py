"""Validation: a good adapter passes, and each way to harm an engine, its base or another tenant is named with its fix."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.base import BaseModelInfo, read_base
from adapters.errors import Fault, InvalidAdapterError
from adapters.manifest import Golden, Manifest, write_manifest
from adapters.peft_format import LoraConfig, version_digest
from adapters.tensors import open_tensors, save_tensors
from adapters.validation import EngineLimits, update_norm, validate_adapter
from tests.factories import TARGETS, adapter_config, adapter_tensors, make_adapter, make_base

LIMITS = EngineLimits(max_rank=16)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModelInfo:
    return read_base(base_folder)


@pytest.fixture
def adapter(tmp_path: Path, base_folder: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base_folder)


def faults(folder: Path, base: BaseModelInfo, limits: EngineLimits = LIMITS) -> dict[str, Fault]:
    """Code -> first fault of that code. Every one must tell where it is and how to mend it."""
    with pytest.raises(InvalidAdapterError) as caught:
        validate_adapter(folder, base, limits)
    for fault in caught.value.faults:
        assert fault.message
        assert fault.where
        assert fault.fix
    return {fault.code: fault for fault in reversed(caught.value.faults)}


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    file = open_tensors(path)
    tensors = {name: file.read(name) for name in file.tensors}
    change(tensors)
    save_tensors(path, tensors)


def manifest_for(served: BaseModelInfo, /, **fields: Any) -> Manifest:
    return Manifest(
        **{
            "name": "support",
            "base": served.fingerprint,
            "rank": 4,
            "alpha": 8,
            "target_modules": list(TARGETS),
            "created_at": 1,
            "base_licence": "Apache-2.0",
            **fields,
        }
    )


def golden(**fields: Any) -> Golden:
    return Golden(
        **{
            "messages": [{"role": "user", "content": "hi"}],
            "completion": "ho",
            "prompt_token_ids": [1, 5],
            "completion_token_ids": [7, 2],
            "logprobs": [-0.1, -0.2],
            "base_logprobs": [-3.0, -4.0],
            **fields,
        }
    )


# What is accepted


def test_a_sound_adapter_is_described(adapter: Path, base: BaseModelInfo) -> None:
    report = validate_adapter(adapter, base, LIMITS)
    assert (report.rank, report.alpha, report.target_modules) == (4, 8.0, tuple(sorted(TARGETS)))
    assert report.digest == version_digest(adapter)
    assert report.size_bytes == sum(path.stat().st_size for path in adapter.iterdir())
    assert 0 < report.norm_ratio < 1
    assert [warning for warning in report.warnings if "manifest" in warning]


def test_a_sound_manifest_leaves_no_warning(adapter: Path, base: BaseModelInfo) -> None:
    write_manifest(manifest_for(base, goldens=[golden()]), adapter)
    report = validate_adapter(adapter, base, LIMITS)
    assert report.warnings == ()
    assert report.manifest is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_float_type_and_name_style_is_accepted(
    tmp_path: Path, base_folder: Path, base: BaseModelInfo, dtype: str
) -> None:
    folder = make_adapter(tmp_path / "a", base_folder, dtype=dtype, targets=["q_proj", "v_proj"])

    def strip(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert validate_adapter(folder, base, LIMITS).target_modules == ("q_proj", "v_proj")


def test_rank_and_alpha_patterns_are_understood(tmp_path: Path, base_folder: Path, base: BaseModelInfo) -> None:
    folder = make_adapter(tmp_path / "a", base_folder, rank_pattern={"layers.0.self_attn.q_proj": 8})
    assert "rank_mismatch" in faults(folder, base)
    wide = adapter_tensors(base, rank=8)
    edit_tensors(folder, lambda tensors: tensors.update({A0: wide[A0], B0: wide[B0]}))
    assert validate_adapter(folder, base, LIMITS).rank == 8


def test_files_that_are_no_part_of_an_adapter_are_ignored_aloud(adapter: Path, base: BaseModelInfo) -> None:
    before = validate_adapter(adapter, base, LIMITS).digest
    (adapter / "README.md").write_text("# Mine")
    (adapter / "chat_template.jinja").write_text("other")
    report = validate_adapter(adapter, base, LIMITS)
    assert report.digest == before
    assert "README.md" in " ".join(report.warnings)
    assert "template" in " ".join(report.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_itself_saves_is_accepted(
    tmp_path: Path, base_folder: Path, base: BaseModelInfo, rslora: bool
) -> None:
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=rslora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    model.save_pretrained(tmp_path / "untrained")
    assert set(faults(tmp_path / "untrained", base)) == {"no_effect"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "trained")
    assert validate_adapter(tmp_path / "trained", base, LIMITS).target_modules == tuple(sorted(TARGETS))


# What is refused: the configuration


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"use_dora": True}, "dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5]}, "new_tokens"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "new_tokens"),
        ({"peft_type": "LOHA"}, "unsupported_peft_type"),
        ({"peft_type": None}, "unsupported_peft_type"),
        ({"task_type": "SEQ_CLS"}, "unsupported_task"),
        ({"fan_in_fan_out": True}, "unsupported_config"),
        ({"init_lora_weights": "pissa_niter_16"}, "unconverted_init"),
        ({"init_lora_weights": "loftq"}, "unconverted_init"),
        ({"layer_replication": [[0, 2]]}, "unsupported_config"),
        ({"alora_invocation_tokens": [1]}, "unsupported_config"),
        ({"use_qalora": True}, "unsupported_config"),
        ({"use_bdlora": {"nblocks": 2}}, "unsupported_config"),
        ({"target_parameters": ["experts.w"]}, "unsupported_config"),
        ({"kasa_config": {"beta": 1}}, "unsupported_config"),
        ({"some_future_field": 3}, "unknown_config_field"),
        ({"r": 0}, "bad_config"),
        ({"r": True}, "bad_config"),
        ({"r": "8"}, "bad_config"),
        ({"lora_alpha": -1}, "bad_config"),
        ({"lora_alpha": None}, "bad_config"),
        ({"use_rslora": "yes"}, "bad_config"),
        ({"target_modules": None}, "bad_config"),
        ({"target_modules": [1]}, "bad_config"),
        ({"rank_pattern": [4]}, "bad_config"),
        ({"rank_pattern": {"q_proj": -4}}, "bad_config"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "unsafe_pattern"),
        ({"target_modules": [*TARGETS, "c_attn"]}, "unknown_target"),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, "unknown_target"),
    ],
)
def test_a_configuration_the_engine_would_refuse_or_ignore_is_named(
    adapter: Path, base: BaseModelInfo, fields: dict[str, Any], code: str
) -> None:
    edit_config(adapter, **fields)
    found = faults(adapter, base)
    assert set(found) == {code}
    assert next(iter(fields)) in found[code].where


@pytest.mark.parametrize("code", ["dora", "bias", "modules_to_save"])
def test_what_can_be_merged_instead_is_told_so(adapter: Path, base: BaseModelInfo, code: str) -> None:
    edit_config(adapter, use_dora=True, bias="all", modules_to_save=["lm_head"])
    assert "lorikeet merge" in faults(adapter, base)[code].fix


def test_unknown_fields_at_neutral_values_are_let_through(adapter: Path, base: BaseModelInfo) -> None:
    edit_config(adapter, future_a=None, future_b=False, future_c={}, future_d=[])
    validate_adapter(adapter, base, LIMITS)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"r": NaN}', '{"r": 4, "r": 8}', "[" * 100_000, "\ud800", '{"lora_alpha": 1e999}']
)
def test_a_broken_configuration_is_named(adapter: Path, base: BaseModelInfo, content: str) -> None:
    (adapter / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "bad_config" in faults(adapter, base)


# What is refused: the files


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, base: BaseModelInfo, name: str) -> None:
    (adapter / name).unlink()
    assert name in faults(adapter, base)["missing_file"].message


def test_an_adapter_one_folder_down_is_pointed_at(tmp_path: Path, base_folder: Path, base: BaseModelInfo) -> None:
    make_adapter(tmp_path / "outer" / "support", base_folder)
    assert "It lies in support" in faults(tmp_path / "outer", base)["missing_file"].message


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "deep/x.pkl"])
def test_a_pickle_is_refused_without_being_opened(adapter: Path, base: BaseModelInfo, name: str) -> None:
    marker = adapter.parent / "ran"
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert name in faults(adapter, base)["pickle_file"].where
    assert not marker.exists()


def test_a_link_is_refused(adapter: Path, base: BaseModelInfo) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter.parent / "elsewhere")
    weights.symlink_to(adapter.parent / "elsewhere")
    assert "forbidden_entry" in faults(adapter, base)


def test_truncated_weights_are_refused(adapter: Path, base: BaseModelInfo) -> None:
    weights = adapter / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    assert set(faults(adapter, base)) == {"lying_header"}


# What is refused: the tensors


def test_a_rank_above_the_engines_is_refused(tmp_path: Path, base_folder: Path, base: BaseModelInfo) -> None:
    folder = make_adapter(tmp_path / "a", base_folder, rank=32)
    assert "up to 16" in faults(folder, base)["rank_too_high"].message


@pytest.mark.parametrize("said", [2, 8])
def test_a_rank_other_than_the_tensors_is_refused(adapter: Path, base: BaseModelInfo, said: int) -> None:
    edit_config(adapter, r=said)
    assert set(faults(adapter, base)) == {"rank_mismatch"}


@pytest.mark.parametrize("hidden", [16, 64])
def test_an_adapter_of_a_narrower_or_wider_base_is_refused(tmp_path: Path, base: BaseModelInfo, hidden: int) -> None:
    other = make_base(tmp_path / "other", hidden=hidden)
    assert "wrong_shape" in faults(make_adapter(tmp_path / "a", other), base)


def test_an_adapter_of_a_deeper_base_is_refused(tmp_path: Path, base: BaseModelInfo) -> None:
    folder = make_adapter(tmp_path / "a", make_base(tmp_path / "other", layers=3))
    assert "layers 0 to 1" in faults(folder, base)["unknown_layer"].message


def test_half_an_adapter_is_refused(adapter: Path, base: BaseModelInfo) -> None:
    edit_tensors(adapter, lambda tensors: tensors.pop(B0))
    assert "lora_B" in faults(adapter, base)["missing_half"].message


def test_a_module_twice_under_two_spellings_is_refused(adapter: Path, base: BaseModelInfo) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({A0.removeprefix("base_model.model."): tensors[A0]}))
    assert set(faults(adapter, base)) == {"duplicate_tensor"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (f"{Q0}.lora_magnitude_vector.weight", "dora"),
        (f"{Q0}.lora_B.bias", "lora_bias"),
        (f"{Q0}.bias", "bias"),
        ("base_model.model.lm_head.weight", "embeddings"),
        ("base_model.model.lm_head.lora_A.weight", "embeddings"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "embeddings"),
        ("base_model.model.model.layers.0.input_layernorm.weight", "modules_to_save"),
        ("base_model.model.model.layers.0.self_attn.c_attn.lora_A.weight", "unknown_target"),
        (f"{Q0}.hada_w1_a", "unknown_tensor"),
        ("x" * 5000, "unknown_tensor"),
    ],
)
def test_a_tensor_that_is_no_plain_lora_is_named(adapter: Path, base: BaseModelInfo, name: str, code: str) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({name: np.ones((4, 32), np.float32)}))
    assert set(faults(adapter, base)) == {code}


def test_a_target_without_tensors_is_refused(adapter: Path, base: BaseModelInfo) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "q_proj" in name]:
            tensors.pop(name)

    edit_tensors(adapter, drop)
    assert set(faults(adapter, base)) == {"missing_target"}


def test_layers_the_engine_leaves_out_are_refused(adapter: Path, base: BaseModelInfo) -> None:
    limits = EngineLimits(16, frozenset(TARGETS) - {"q_proj"})
    assert set(faults(adapter, base, limits)) == {"module_not_served"}


def test_whole_numbers_are_refused_as_weights(adapter: Path, base: BaseModelInfo) -> None:
    edit_tensors(adapter, lambda tensors: tensors.update({A0: np.ones((4, 32), np.int32)}))
    assert set(faults(adapter, base)) == {"bad_dtype"}


def test_an_empty_weights_file_is_refused(adapter: Path, base: BaseModelInfo) -> None:
    edit_tensors(adapter, lambda tensors: tensors.clear())
    assert "no_lora" in faults(adapter, base)


# What is refused: the values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(adapter: Path, base: BaseModelInfo, value: float) -> None:
    edit_tensors(adapter, lambda tensors: tensors[B0].__setitem__((3, 2), value))
    assert "1 values" in faults(adapter, base)["not_finite"].message


@pytest.mark.parametrize("value", [1e30, 1e5])
def test_values_no_training_gives_are_refused(adapter: Path, base: BaseModelInfo, value: float) -> None:
    edit_tensors(adapter, lambda tensors: tensors[B0].__setitem__((3, 2), value))
    assert "absurd_magnitude" in faults(adapter, base)


def test_an_update_far_larger_than_its_weight_is_refused_with_the_ratio(
    tmp_path: Path, base_folder: Path, base: BaseModelInfo
) -> None:
    folder = make_adapter(tmp_path / "a", base_folder, scale=50)
    assert "times the norm" in faults(folder, base)["absurd_magnitude"].message


def test_an_absurd_alpha_is_refused_although_the_tensors_are_sane(adapter: Path, base: BaseModelInfo) -> None:
    edit_config(adapter, lora_alpha=100_000)
    assert set(faults(adapter, base)) == {"absurd_magnitude"}


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_without_effect_is_refused(adapter: Path, base: BaseModelInfo, side: str) -> None:
    def clear(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if side in name:
                tensors[name][:] = 0

    edit_tensors(adapter, clear)
    assert set(faults(adapter, base)) == {"no_effect"}


@given(rank=st.integers(1, 5), rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_update_norm_is_that_of_the_product(rank: int, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
    assert update_norm(a, b, 2.0) == pytest.approx(float(np.linalg.norm(2.0 * b @ a)), rel=1e-9)


# What is refused: the manifest


def test_another_base_is_recognised_by_its_digest(adapter: Path, base: BaseModelInfo) -> None:
    other = base.fingerprint.model_copy(update={"weights_digest": "0" * 64})
    write_manifest(manifest_for(base, base=other), adapter)
    assert set(faults(adapter, base)) == {"wrong_base"}


def test_another_template_is_recognised_by_its_digest(adapter: Path, base: BaseModelInfo) -> None:
    other = base.fingerprint.model_copy(update={"template_digest": "0" * 64})
    write_manifest(manifest_for(base, base=other), adapter)
    assert set(faults(adapter, base)) == {"wrong_template"}


@pytest.mark.parametrize("fields", [{"rank": 8}, {"alpha": 16}])
def test_a_manifest_of_another_run_is_refused(adapter: Path, base: BaseModelInfo, fields: dict[str, Any]) -> None:
    write_manifest(manifest_for(base, **fields), adapter)
    assert set(faults(adapter, base)) == {"manifest_mismatch"}


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": [-0.1]},
        {"base_logprobs": []},
        {"prompt_token_ids": []},
        {"completion_token_ids": [7, 128]},
        {"prompt_token_ids": [-1]},
        {"prompt_token_ids": [1] * 600},
        {"logprobs": [-0.1, 1.0]},
        {"logprobs": [-0.1, -1e9]},
    ],
)
def test_a_golden_that_cannot_be_replayed_is_refused(
    adapter: Path, base: BaseModelInfo, fields: dict[str, Any]
) -> None:
    write_manifest(manifest_for(base, goldens=[golden(), golden(**fields)]), adapter)
    assert "Golden 1" in faults(adapter, base)["invalid_golden"].message


def test_a_broken_manifest_is_named_field_by_field(adapter: Path, base: BaseModelInfo) -> None:
    (adapter / "manifest.json").write_text('{"name": 3}')
    with pytest.raises(InvalidAdapterError) as caught:
        validate_adapter(adapter, base, LIMITS)
    assert len(caught.value.faults) > 3
    assert {fault.code for fault in caught.value.faults} == {"invalid_manifest"}


# The report as a whole


def test_one_report_names_every_fault(adapter: Path, base: BaseModelInfo) -> None:
    edit_config(adapter, use_dora=True, r=8)
    edit_tensors(adapter, lambda tensors: tensors[B0].__setitem__((0, 0), np.nan))
    (adapter / "training_args.bin").write_bytes(b"x")
    other = base.fingerprint.model_copy(update={"weights_digest": "0" * 64, "template_digest": "1" * 64})
    write_manifest(manifest_for(base, base=other), adapter)
    assert set(faults(adapter, base)) == {
        "dora",
        "rank_mismatch",
        "not_finite",
        "pickle_file",
        "wrong_base",
        "wrong_template",
        "manifest_mismatch",
    }


def test_the_scale_follows_rslora_and_patterns() -> None:
    config = LoraConfig(4, 8.0, ("q_proj",), rank_pattern={"k_proj": 16}, alpha_pattern={"k_proj": 4.0})
    assert config.scale_of("model.layers.0.self_attn.q_proj") == 2.0
    assert config.scale_of("model.layers.0.self_attn.k_proj") == 0.25
    stabilised = LoraConfig(4, 8.0, ("q_proj",), rslora=True)
    assert stabilised.scale_of("q_proj") == 4.0


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "manifest.json"]),
    edits=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_a_damaged_adapter_is_described_or_refused_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory,
    base_folder: Path,
    base: BaseModelInfo,
    name: str,
    edits: list[tuple[int, int]],
) -> None:
    folder = make_adapter(tmp_path_factory.mktemp("fuzz") / "a", base_folder, targets=["q_proj"], rank=2)
    write_manifest(manifest_for(base, rank=2, goldens=[golden()]), folder)
    content = bytearray((folder / name).read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    (folder / name).write_bytes(content)
    try:
        validate_adapter(folder, base, LIMITS)
    except InvalidAdapterError as exc:
        assert all(fault.as_dict().values() for fault in exc.faults)  # noqa: PT017


def test_an_unusual_adapter_is_accepted_with_a_warning(tmp_path: Path, base_folder: Path, base: BaseModelInfo) -> None:
    strong = make_adapter(tmp_path / "strong", base_folder, scale=1.0)
    assert "unusually much" in " ".join(validate_adapter(strong, base, LIMITS).warnings)
    weak = make_adapter(tmp_path / "weak", base_folder, scale=1e-9)
    assert "hardly any effect" in " ".join(validate_adapter(weak, base, LIMITS).warnings)


@pytest.mark.slow
def test_the_factory_writes_the_configuration_peft_writes(base: BaseModelInfo) -> None:
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(task_type="CAUSAL_LM").to_dict()
    assert set(adapter_config(base)) <= set(written)
