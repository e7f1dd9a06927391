"""What a training run will take: memory by part, disk, tokens, time and money, from the model's configuration alone. Pure.

Memory is what PyTorch keeps for the backward pass of these models, counted layer by layer (`activation_bytes`), plus weights,
gradients, AdamW's moments and the logits. `python -m benchmarks.memory` compares it with real runs on a CPU; what is different
on a GPU (fused attention, dropout masks of one byte, logits in tiles) is by the source of PyTorch and TRL 1.16, not measured.
Time: 2 FLOPs per token and weight forward, as many for the gradient of the activations, as many again for that of trained
weights; once more forward with gradient checkpointing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.wording import one_line
from trainer.config import CONFIGS, LoraConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.shape import Linear, ModelShape, Targets, adapter_parameters, targeted

Tuning = Literal["lora", "qlora", "full"]
Machine = Literal["gpu", "cpu"]

GPUS_FILE = CONFIGS / "gpus.yaml"
GIB = 2**30
FLOAT32 = 4
MOMENTS = 8  # bytes of AdamW's state per trained parameter
NF4 = 0.5  # bytes a weight
NF4_STATE = 1 / 64 + 4 / (64 * 256)  # bytes a weight: a scale in 8 bits per 64, whose own scale in 32 bits per 256
EAGER_TOKENS = 512  # rows up to here are attended to without the fused kernel on a CPU, see trainer.methods
DROPOUT_MASK: Mapping[Machine, int] = {"gpu": 1, "cpu": 4}  # bytes: a bool, or on a CPU the noise itself in float32
# On a CPU logits, their log-softmax and two gradients of it are alive at once: measured, see benchmarks/memory.py.
LOGIT_BYTES = 16
TILE_TOKENS, TILE_VOCAB = 4096, 32768  # on a GPU TRL's fused head holds one bf16 tile of the logits
CUDA_CONTEXT_BYTES = round(0.8 * GIB)  # context, kernels and cuBLAS workspaces; differs by driver and GPU
IMPORTS_BYTES = 560 * 2**20  # torch, transformers, peft and trl imported, measured
HEAP_SHARE = 0.35  # glibc keeps about so much more of activations than is alive, measured; a GPU: 10 % is left free
UTILISATION = 0.35  # of a GPU's peak; training small batches reaches a third to a half of it
CPU_TFLOPS_PER_CORE = 0.12  # measured: SmolLM2-135M, bf16, 100-token rows, AVX-512 cores
FREE_SHARE = 0.9  # of a GPU's memory that may be planned with


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(_Frozen):
    name: str
    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0, description="Dense bf16 peak.")
    per_hour: float = Field(ge=0, description="Price of an hour.")


class GpuList(_Frozen):
    """configs/gpus.yaml: prices of a day, to be edited."""

    priced_on: str
    currency: str = "USD"
    gpus: tuple[Gpu, ...] = Field(min_length=1, description="The smallest first.")


def load_gpus(path: Path = GPUS_FILE) -> GpuList:
    """Raises ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return GpuList.model_validate({**raw, "priced_on": str(raw.get("priced_on"))} if isinstance(raw, dict) else raw)
    except (OSError, yaml.YAMLError, ValidationError) as exc:
        raise ConfigError(f"{path} is no list of GPUs: {one_line(exc)}") from exc


@dataclass(frozen=True)
class AdapterPlan:
    """The LoRA that is trained."""

    rank: int = 8
    target_modules: Targets = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dora: bool = False
    dropout: float = 0.05

    def parameters(self, shape: ModelShape) -> int:
        return adapter_parameters(shape, self.rank, self.target_modules, rank_pattern=self.rank_pattern, dora=self.dora)


@dataclass(frozen=True)
class Workload:
    """rows x tokens_per_row is one epoch; batch_rows go through the model at once, in the worst case all of them longest."""

    rows: int
    tokens_per_row: int
    epochs: float
    batch_rows: int
    longest_row: int | None = None  # None: all are alike
    trained_share: float = 1.0  # of the tokens: answers, where only they count
    accumulate: int = 1
    max_steps: int | None = None
    bf16: bool = True
    gradient_checkpointing: bool = False
    sequences_per_row: int = 1  # 2 for preference pairs

    @property
    def tokens(self) -> int:
        """Over all epochs."""
        rows = self.rows * self.epochs
        if self.max_steps is not None:
            rows = min(rows, self.max_steps * self.batch_rows * self.accumulate)
        return round(rows * self.tokens_per_row * self.sequences_per_row)

    @property
    def length(self) -> int:
        return self.longest_row or self.tokens_per_row

    @property
    def batch_tokens(self) -> int:
        """In the largest batch."""
        return self.batch_rows * self.sequences_per_row * self.length


@dataclass(frozen=True)
class Estimate:
    """memory_bytes and disk_bytes by part. flops: of the whole run."""

    tuning: Tuning
    machine: Machine
    parameters: int  # the adapter's included
    trainable: int
    memory_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    tokens: int
    flops: float

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    def seconds_on(self, gpu: Gpu) -> float:
        return self.flops / (gpu.tflops * 1e12 * UTILISATION)

    def cost_on(self, gpu: Gpu) -> float:
        return self.seconds_on(gpu) / 3600 * gpu.per_hour

    def cpu_seconds(self, cores: int) -> float:
        return self.flops / (CPU_TFLOPS_PER_CORE * cores * 1e12)

    def fits(self, gpu: Gpu) -> bool:
        return self.peak_bytes <= FREE_SHARE * gpu.memory_gib * GIB

    def smallest_gpu(self, gpus: GpuList) -> Gpu | None:
        """None where no single one holds the run."""
        return next((gpu for gpu in gpus.gpus if self.fits(gpu)), None)


@dataclass(frozen=True)
class RowFacts:
    """What is known of a stage's rows. trained_share: of their tokens, those that count in the loss."""

    rows: int
    tokens_per_row: int
    longest_row: int | None = None
    trained_share: float = 1.0


def plan_of(lora: LoraConfig) -> AdapterPlan:
    return AdapterPlan(lora.r, lora.target_modules, lora.rank_pattern, lora.dora, lora.dropout)


def estimate_run(
    config: TrainConfig,
    shape: ModelShape,
    stages: Sequence[RowFacts],
    *,
    tuning: Tuning | None = None,
    lora: LoraConfig | None = None,
    machine: Machine = "gpu",
) -> Estimate:
    """A whole run: the memory of its heaviest stage, the tokens and time of all.

    stages: rows of each of the configuration's courses, before packing. tuning, lora: others than the configuration's.
    Raises ConfigError when a target is none of the model's layers.
    """
    tuning, plan = tuning or config.tuning, plan_of(lora or config.lora)
    found = []
    for stage, facts in zip(config.courses, stages, strict=True):
        rows, tokens_per_row, longest = facts.rows, facts.tokens_per_row, facts.longest_row
        if stage.packs:
            rows, tokens_per_row, longest = math.ceil(rows * tokens_per_row / stage.max_tokens), stage.max_tokens, None
        work = Workload(
            rows=rows,
            tokens_per_row=tokens_per_row,
            epochs=stage.optimizer.epochs,
            batch_rows=stage.optimizer.batch_rows,
            longest_row=longest,
            trained_share=1.0 if stage.method == "pretrain" else facts.trained_share,
            accumulate=stage.optimizer.accumulate,
            max_steps=stage.optimizer.max_steps,
            bf16=config.precision == "bf16",
            gradient_checkpointing=config.gradient_checkpointing,
            sequences_per_row=2 if stage.method == "dpo" else 1,
        )
        found.append(estimate(shape, tuning, plan, work, machine=machine))
    heaviest = max(found, key=lambda each: each.peak_bytes)
    return replace(heaviest, tokens=sum(each.tokens for each in found), flops=sum(each.flops for each in found))


def estimate(
    shape: ModelShape, tuning: Tuning, plan: AdapterPlan, work: Workload, *, machine: Machine = "gpu"
) -> Estimate:
    """Raises ConfigError when a target of the plan is none of the model's layers."""
    adapter = 0 if tuning == "full" else plan.parameters(shape)
    trainable = shape.parameters if tuning == "full" else adapter
    return Estimate(
        tuning=tuning,
        machine=machine,
        parameters=shape.parameters + adapter,
        trainable=trainable,
        memory_bytes=_memory(shape, tuning, plan, work, machine, adapter, trainable),
        disk_bytes={
            "base model": 2 * shape.parameters,
            "checkpoints": 2 * trainable * (FLOAT32 + MOMENTS),  # the best one and the last
            "result": 2 * trainable,
        },
        tokens=work.tokens,
        flops=_flops(shape, tuning, work),
    )


def _memory(
    shape: ModelShape,
    tuning: Tuning,
    plan: AdapterPlan,
    work: Workload,
    machine: Machine,
    adapter: int,
    trainable: int,
) -> dict[str, int]:
    width = 2 if work.bf16 else FLOAT32
    quantized = shape.linear_weights if tuning == "qlora" else 0
    per_weight = FLOAT32 if tuning == "full" else width
    copied = (shape.linear_weights + shape.vocab * shape.hidden if tuning == "full" else adapter) if work.bf16 else 0
    activations = _activations(shape, tuning, plan, work, machine)
    logits = _logits(shape, work, machine)
    parts = {
        "weights": quantized * NF4 + (shape.parameters - quantized) * per_weight,
        "quantization state": quantized * NF4_STATE,
        "adapter": adapter * FLOAT32,
        "gradients": trainable * FLOAT32,
        "optimizer": trainable * MOMENTS,
        "bf16 copies of trained weights": copied * 2,
        "activations": activations,
        "logits": logits,
    }
    if machine == "gpu":
        parts["CUDA context"] = CUDA_CONTEXT_BYTES
    else:
        parts["heap"] = HEAP_SHARE * (activations + logits)
        parts["imports"] = IMPORTS_BYTES
    return {name: round(size_bytes) for name, size_bytes in parts.items()}


def _activations(shape: ModelShape, tuning: Tuning, plan: AdapterPlan, work: Workload, machine: Machine) -> float:
    """Kept at the height of the backward pass, all layers together."""
    width = 2 if work.bf16 else FLOAT32
    layer = activation_bytes(shape, tuning, plan, work, machine) * work.batch_tokens
    last = 2 * FLOAT32 * shape.hidden * work.batch_tokens  # the last norm
    if not work.gradient_checkpointing:
        return shape.layers * layer + last
    residual = FLOAT32 if tuning == "full" else width
    return shape.layers * shape.hidden * residual * work.batch_tokens + layer + last


def activation_bytes(shape: ModelShape, tuning: Tuning, plan: AdapterPlan, work: Workload, machine: Machine) -> float:
    """What one block keeps per token for its backward pass.

    A frozen linear layer keeps nothing: the gradient of its input needs the weight alone. A trained one keeps its input, in
    the dtype it computes in, and so does the A of a LoRA; under autocast each of them casts (and keeps) its own copy.
    """
    width = 2 if work.bf16 else FLOAT32
    norms = 2 * FLOAT32 * shape.hidden * (2 if tuning == "full" else 1)
    feed_forward = 3 * shape.inner * width  # gate, its activation, up
    eager = machine == "cpu" and work.length <= EAGER_TOKENS
    if eager:  # keys and values repeated for each head; scores in float32, and their bf16 copy
        scores = work.length * shape.heads * (FLOAT32 + (width if work.bf16 else 0))
        attention = 3 * shape.queries * width + scores
    else:  # queries, keys, values, the output, and a float32 per head
        attention = (2 * shape.queries + 2 * shape.keys) * width + shape.heads * FLOAT32
    return norms + feed_forward + attention + _linear_inputs(shape, tuning, plan, work, machine)


def _linear_inputs(shape: ModelShape, tuning: Tuning, plan: AdapterPlan, work: Workload, machine: Machine) -> float:
    width = 2 if work.bf16 else FLOAT32
    linears = shape.linears if tuning == "full" else targeted(shape, plan.target_modules)
    experts = shape.experts
    routed = (2 * shape.hidden * experts.used + shape.inner) * width if experts and tuning == "full" else 0
    dropped = tuning != "full" and plan.dropout > 0
    if not work.bf16 and not dropped:  # nothing is cast and nothing dropped: layers with the same input share it
        return width * sum(features for _, features in {_input_of(linear) for linear in linears}) + routed
    mask = DROPOUT_MASK[machine] if dropped else 0
    dora = 2 * width * sum(linear.out_features for linear in linears) if plan.dora and tuning != "full" else 0
    return sum(linear.in_features for linear in linears) * (width + mask) + dora + routed


def _input_of(linear: Linear) -> tuple[str, int]:
    """Equal for linear layers of a block that read the same thing."""
    block, _, name = linear.name.partition(".")
    return (name if name in ("o_proj", "down_proj") else block, linear.in_features)


def _logits(shape: ModelShape, work: Workload, machine: Machine) -> float:
    """Of the positions whose next token counts in the loss, at least one a row."""
    positions = max(work.batch_rows * work.sequences_per_row, math.ceil(work.batch_tokens * work.trained_share))
    if machine == "gpu":
        return 2 * min(positions, TILE_TOKENS) * min(shape.vocab, TILE_VOCAB)
    return positions * shape.vocab * LOGIT_BYTES


def _flops(shape: ModelShape, tuning: Tuning, work: Workload) -> float:
    passes = (3 if tuning == "full" else 2) + work.gradient_checkpointing
    mean_keys = work.tokens_per_row / 2  # a token attends to those before it
    attention = 4 * shape.layers * shape.queries * mean_keys * (3 + work.gradient_checkpointing)
    return work.tokens * (2.0 * passes * shape.multiplied + attention)
