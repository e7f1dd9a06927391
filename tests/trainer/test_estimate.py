"""The estimator against known answers, and against a real model's count."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.estimate import Workload, adapter_parameters, estimate, lora_parameters, read_shape

LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
WORK = Workload(rows=1000, tokens_per_row=100, epochs=1, batch_rows=4)


def test_rank_8_on_one_square_matrix() -> None:
    assert lora_parameters(4096, 4096, 8) == 65_536
    assert 4096 * 4096 == 16_777_216


def test_rank_8_on_queries_and_values_of_llama_2_7b() -> None:
    found = estimate(read_shape(LLAMA_2_7B), "lora", rank=8, target_modules=["q_proj", "v_proj"], work=WORK)
    assert found.trainable == 4_194_304
    assert found.parameters == 6_742_609_920


def test_full_training_takes_sixteen_bytes_a_parameter() -> None:
    shape = read_shape(LLAMA_2_7B)
    found = estimate(shape, "full", rank=8, target_modules="all-linear", work=WORK)
    assert found.memory_bytes["weights"] + found.memory_bytes["training state"] == 16 * shape.parameters
    assert 16 * shape.parameters == pytest.approx(112e9, rel=0.05)


def test_four_bit_weights_take_half_a_byte_each() -> None:
    found = estimate(read_shape(LLAMA_2_70B), "qlora", rank=8, target_modules="all-linear", work=WORK)
    assert found.memory_bytes["weights"] == pytest.approx(35e9, rel=0.02)


def test_a_7b_lora_fits_where_full_training_does_not() -> None:
    shape = read_shape(LLAMA_2_7B)
    lora = estimate(shape, "lora", rank=8, target_modules="all-linear", work=WORK).smallest_gpu
    full = estimate(shape, "full", rank=8, target_modules="all-linear", work=WORK).smallest_gpu
    assert lora is not None
    assert lora.memory_gib == 24
    assert full is None or full.memory_gib > 80


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_count_equals_a_real_models(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert read_shape(config.to_dict()).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_adapter_count_equals_pefts(tiny_base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainable = sum(parameter.numel() for parameter in peft.parameters() if parameter.requires_grad)
    shape = read_shape(json.loads((tiny_base / "config.json").read_text()))
    assert adapter_parameters(shape, 4, "all-linear") == trainable


def test_an_unknown_family_and_an_unknown_target_are_refused() -> None:
    with pytest.raises(ConfigError, match="mamba"):
        read_shape({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="lm_head"):
        adapter_parameters(read_shape(LLAMA_2_7B), 8, ["lm_head"])
