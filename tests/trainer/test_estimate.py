"""The estimator against known answers, and against a real model's count."""

import json
from typing import Any

import pytest

from trainer.config import CONFIGS, TrainConfig
from trainer.errors import ConfigError
from trainer.estimate import (
    AdapterPlan,
    RowFacts,
    Workload,
    activation_bytes,
    estimate,
    estimate_run,
    load_gpus,
)
from trainer.shape import adapter_parameters, lora_parameters, read_shape

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
ALL_LINEAR = AdapterPlan()


def test_rank_8_on_one_square_matrix() -> None:
    assert lora_parameters(4096, 4096, 8) == 65_536
    assert 4096 * 4096 == 16_777_216


def test_rank_8_on_queries_and_values_of_llama_2_7b() -> None:
    found = estimate(read_shape(LLAMA_2_7B), "lora", AdapterPlan(8, ["q_proj", "v_proj"]), WORK)
    assert found.trainable == 4_194_304
    assert found.parameters - found.trainable == 6_738_415_616
    assert found.parameters == 6_742_609_920


def test_full_training_takes_sixteen_bytes_a_parameter() -> None:
    shape = read_shape(LLAMA_2_7B)
    memory = estimate(shape, "full", ALL_LINEAR, WORK).memory_bytes
    assert memory["weights"] + memory["gradients"] + memory["optimizer"] == 16 * shape.parameters
    assert 16 * 7e9 == 112e9


def test_four_bit_weights_take_half_a_byte_each() -> None:
    memory = estimate(read_shape(LLAMA_2_70B), "qlora", ALL_LINEAR, WORK).memory_bytes
    assert memory["weights"] == pytest.approx(35e9, rel=0.02)
    assert memory["quantization state"] == pytest.approx(
        0.127 / 8 * 68.4e9, rel=0.01
    )  # Dettmers et al. 2023, section 3


def test_a_7b_lora_fits_where_full_training_does_not() -> None:
    gpus = load_gpus()
    shape = read_shape(LLAMA_2_7B)
    lora = estimate(shape, "lora", ALL_LINEAR, WORK).smallest_gpu(gpus)
    full = estimate(shape, "full", ALL_LINEAR, WORK).smallest_gpu(gpus)
    assert lora is not None
    assert lora.memory_gib == 24
    assert full is None or full.memory_gib > 80


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24}}
FAMILIES = "llama mistral qwen2 qwen3 smollm3 granite gemma gemma2 gemma3_text phi3 mixtral qwen3_moe".split()


@pytest.mark.slow  # with PEFT, and fourteen models built
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own, of fused experts
@pytest.mark.parametrize(
    ("family", "tied"), [*((family, None) for family in FAMILIES), ("llama", True), ("gemma", False)]
)
def test_counts_equal_a_real_models_and_pefts(family: str, tied: bool | None) -> None:
    """On torch's meta device, where nothing is computed. None: whatever the family does by default."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    more = EXPERTS.get(family, {}) | ({} if tied is None else {"tie_word_embeddings": tied})
    config = AutoConfig.for_model(family, **SMALL, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        shape = read_shape(config.to_diff_dict() if tied is None else config.to_dict())
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        pattern = {"o_proj": 8, r"layers\.1\.self_attn\.o_proj": 2}
        dora = family not in EXPERTS
        adapted = LoraConfig(r=4, target_modules="all-linear", rank_pattern=pattern, use_dora=dora)
        peft = get_peft_model(model, adapted, low_cpu_mem_usage=True)
    trainable = sum(parameter.numel() for name, parameter in peft.named_parameters() if "lora_" in name)
    assert adapter_parameters(shape, 4, "all-linear", rank_pattern=pattern, dora=dora) == trainable


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m-instruct", 134_515_008),
        ("llama-3.1-8b-instruct", 8_030_261_248),
        ("qwen2.5-7b-instruct", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b-instruct-v0.3", 7_248_023_552),
    ],
)
def test_shipped_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    shape = read_shape(json.loads((CONFIGS / "bases" / f"{name}.config.json").read_text()))
    assert shape.parameters == parameters


def test_every_shipped_shape_is_tested() -> None:
    assert len(list((CONFIGS / "bases").glob("*.json"))) == 5


def test_one_expert_in_four_costs_the_time_of_one_and_the_memory_of_four() -> None:
    config = SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}
    shape = read_shape(config)
    assert shape.parameters > shape.multiplied
    assert read_shape(config | {"num_local_experts": 8}).multiplied == pytest.approx(shape.multiplied, rel=0.02)
    with pytest.raises(ConfigError, match="no DoRA on experts"):
        adapter_parameters(shape, 8, "all-linear", dora=True)
    with pytest.raises(ConfigError, match="some of their blocks"):
        read_shape(SMALL | {"model_type": "qwen3_moe", "mlp_only_layers": [0], **EXPERTS["qwen3_moe"]})


def test_an_unknown_family_and_an_unknown_target_are_refused() -> None:
    with pytest.raises(ConfigError, match="mamba"):
        read_shape({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="lm_head"):
        adapter_parameters(read_shape(LLAMA_2_7B), 8, ["lm_head"])


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_activations_are_what_pytorch_keeps_for_the_backward_pass(tuning: Any, dropout: float, bf16: bool) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "vocab_size": 64}
    config = AutoConfig.for_model("llama", **(SMALL | sizes), attn_implementation="eager")
    frozen = torch.bfloat16 if bf16 and tuning == "lora" else torch.float32
    model: Any = AutoModelForCausalLM.from_config(config).to(frozen)
    if tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear"))
    work = Workload(rows=2, tokens_per_row=128, epochs=1, batch_rows=2, bf16=bf16)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(3, 64, (2, 128))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        output = model(input_ids=tokens, use_cache=False).logits
    shape = read_shape(config.to_dict())
    plan = AdapterPlan(rank=2, dropout=dropout)
    cast_weights = shape.linear_weights * 2 if bf16 and tuning == "full" else 0
    expected = shape.layers * activation_bytes(shape, tuning, plan, work, "cpu") * work.batch_tokens + cast_weights
    assert output.requires_grad
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"name": "x", "data": {"train": "rows.jsonl"}, "max_tokens": 400} | changes)


ROWS = [RowFacts(rows=1000, tokens_per_row=100, longest_row=300, trained_share=0.1)]


def test_a_runs_peak_is_of_its_longest_rows_and_its_time_of_all() -> None:
    shape = read_shape(LLAMA_2_7B)
    found = estimate_run(settings(), shape, ROWS)
    short = estimate_run(settings(), shape, [RowFacts(1000, 100, 100, 0.1)])
    assert found.tokens == short.tokens == 100_000
    assert found.flops == short.flops
    assert found.memory_bytes["activations"] == pytest.approx(3 * short.memory_bytes["activations"])


def test_packing_fills_rows_and_steps_end_a_run_early() -> None:
    shape = read_shape(LLAMA_2_7B)
    packed = estimate_run(settings(packing=True), shape, ROWS)
    assert packed.tokens == 100_000
    assert packed.memory_bytes["activations"] > estimate_run(settings(), shape, ROWS).memory_bytes["activations"]
    assert estimate_run(settings(optimizer={"max_steps": 2, "batch_rows": 3}), shape, ROWS).tokens == 600


def test_stages_take_the_memory_of_the_heaviest_and_the_time_of_all() -> None:
    shape = read_shape(LLAMA_2_7B)
    data = {"train": "rows.jsonl"}
    both = settings(data=None, stages=[{"method": "pretrain", "data": data}, {"method": "sft", "data": data}])
    found = estimate_run(both, shape, [*ROWS, *ROWS])
    assert found.tokens == 200_000
    assert found.peak_bytes == estimate_run(settings(method="pretrain"), shape, ROWS).peak_bytes


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("tuning", ["lora", "qlora", "full"])
def test_checkpointing_takes_less_memory_and_more_time(tuning: Any, machine: Any) -> None:
    shape = read_shape(LLAMA_2_7B)
    plain = estimate_run(settings(), shape, ROWS, tuning=tuning, machine=machine)
    checked = estimate_run(settings(gradient_checkpointing=True), shape, ROWS, tuning=tuning, machine=machine)
    assert checked.peak_bytes < plain.peak_bytes
    assert checked.flops > plain.flops


def test_logits_are_of_the_answers_on_a_cpu_and_in_tiles_on_a_gpu() -> None:
    shape = read_shape(LLAMA_2_7B)
    on_cpu = estimate_run(settings(), shape, ROWS, machine="cpu").memory_bytes["logits"]
    assert on_cpu == 8 * 300 * 0.1 * 32000 * 16
    assert estimate_run(settings(), shape, ROWS).memory_bytes["logits"] == 2 * 240 * 32000
