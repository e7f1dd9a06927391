"""What a training run will take: exact parameters from the model's configuration, the rest roughly, by stated formulas. Pure.

Memory: weights + 16 bytes per trained parameter (AdamW: weight, gradient, two moments, in float32; a LoRA's base has none
of it) + activations, 34 bytes per token, layer and hidden unit in half precision (Korthikanti et al. 2022, section 4,
without the attention scores; 2 with gradient checkpointing) + logits, three float32 copies of tokens x vocabulary.
Time: 6 FLOPs per token and parameter for full training, 4 with a frozen base, 2 more with gradient checkpointing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import ConfigError

Method = Literal["full", "lora", "qlora"]

TRAINED_BYTES = 16
WEIGHT_BYTES: Mapping[Method, float] = {"full": 0, "lora": 2, "qlora": 0.5}  # full: within TRAINED_BYTES
ACTIVATION_BYTES = 34
CHECKPOINTED_BYTES = 2
LOGIT_COPIES = 3
UTILISATION = 0.35  # of a GPU's peak; training small batches reaches a third to a half of it
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """tflops: dense bf16 peak. usd_per_hour: order of magnitude of rented ones in 2026, for comparison only."""

    name: str
    memory_gib: float
    tflops: float
    usd_per_hour: float


GPUS = (
    Device("L4 24 GB", 24, 121, 0.8),
    Device("A6000 48 GB", 48, 155, 0.9),
    Device("A100 80 GB", 80, 312, 1.8),
    Device("H100 80 GB", 80, 989, 3.0),
    Device("H200 141 GB", 141, 989, 4.0),
)
CPU_TFLOPS_PER_CORE = 0.12  # measured: SmolLM2-135M, bf16, 100-token rows, AVX-512 cores


@dataclass(frozen=True)
class Linear:
    """One linear layer kind of a block."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.out_features * (self.in_features + self.bias)


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM)."""

    hidden: int
    layers: int
    vocab: int
    tied_embeddings: bool
    linears: tuple[Linear, ...]  # of one block
    norms: int  # norm parameters of one block

    @property
    def parameters(self) -> int:
        block = sum(linear.parameters for linear in self.linears) + self.norms
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * block + self.hidden


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """From config.json. Raises ConfigError for a model family whose layers are not known here."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"Models of type '{family}' cannot be counted; known: {', '.join(sorted(FAMILIES))}.")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        inner, layers, vocab = (int(config[name]) for name in ("intermediate_size", "num_hidden_layers", "vocab_size"))
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"config.json lacks what a {family} model needs: {exc}") from exc
    head = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads) * head
    bias = family == "qwen2" or bool(config.get("attention_bias"))
    mlp_bias = bool(config.get("mlp_bias"))
    return ModelShape(
        hidden=hidden,
        layers=layers,
        vocab=vocab,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        linears=(
            Linear("q_proj", heads * head, hidden, bias),
            Linear("k_proj", kv, hidden, bias),
            Linear("v_proj", kv, hidden, bias),
            Linear("o_proj", hidden, heads * head, bias and family != "qwen2"),
            Linear("gate_proj", inner, hidden, mlp_bias),
            Linear("up_proj", inner, hidden, mlp_bias),
            Linear("down_proj", hidden, inner, mlp_bias),
        ),
        norms=2 * hidden + (2 * head if family == "qwen3" else 0),
    )


def lora_parameters(out_features: int, in_features: int, rank: int) -> int:
    """A [rank, in] and B [out, rank]."""
    return rank * (out_features + in_features)


def adapter_parameters(shape: ModelShape, rank: int, target_modules: Literal["all-linear"] | list[str]) -> int:
    """Raises ConfigError when a target is none of the model's layers."""
    names = [linear.name for linear in shape.linears]
    wanted = names if target_modules == "all-linear" else target_modules
    if unknown := sorted(set(wanted) - set(names)):
        raise ConfigError(f"The model has no layers {', '.join(unknown)}; it has {', '.join(names)}.")
    block = sum(
        lora_parameters(each.out_features, each.in_features, rank) for each in shape.linears if each.name in wanted
    )
    return shape.layers * block


@dataclass(frozen=True)
class Workload:
    """rows x tokens_per_row is one epoch; batch_rows go through the model at once."""

    rows: int
    tokens_per_row: int
    epochs: float
    batch_rows: int
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Estimate:
    method: Method
    parameters: int  # the adapter's included
    trainable: int
    memory_bytes: dict[str, int]  # by part
    disk_bytes: int
    tokens: int
    flops: float

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    def seconds_on(self, device: Device) -> float:
        return self.flops / (device.tflops * 1e12 * UTILISATION)

    def cpu_seconds(self, cores: int) -> float:
        return self.flops / (CPU_TFLOPS_PER_CORE * cores * 1e12)

    @property
    def smallest_gpu(self) -> Device | None:
        """The first whose memory holds the run, a tenth left free; None where no single one does."""
        return next((gpu for gpu in GPUS if self.peak_bytes < 0.9 * gpu.memory_gib * GIB), None)


def estimate(
    shape: ModelShape, method: Method, *, rank: int, target_modules: Literal["all-linear"] | list[str], work: Workload
) -> Estimate:
    """Raises ConfigError when a target is none of the model's layers."""
    trainable = shape.parameters if method == "full" else adapter_parameters(shape, rank, target_modules)
    batch_tokens = work.batch_rows * work.tokens_per_row
    per_unit = CHECKPOINTED_BYTES if work.gradient_checkpointing else ACTIVATION_BYTES
    memory = {
        "weights": round(shape.parameters * WEIGHT_BYTES[method]),
        "training state": trainable * TRAINED_BYTES,
        "activations": batch_tokens * shape.layers * shape.hidden * per_unit,
        "logits": batch_tokens * shape.vocab * 4 * LOGIT_COPIES,
    }
    tokens = round(work.rows * work.tokens_per_row * work.epochs)
    per_token = (6 if method == "full" else 4) + (2 if work.gradient_checkpointing else 0)
    return Estimate(
        method=method,
        parameters=shape.parameters + (0 if method == "full" else trainable),
        trainable=trainable,
        memory_bytes=memory,
        disk_bytes=2 * trainable * 12 + 2 * trainable,  # two checkpoints with optimizer state, one bf16 result
        tokens=tokens,
        flops=float(per_token) * shape.parameters * tokens,
    )
