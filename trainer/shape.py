"""A model's shape from its config.json: its layers, its parameters, what a LoRA on it trains. Exact, without weights. Pure."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import ConfigError

Targets = Literal["all-linear"] | list[str]

TIED = frozenset({"gemma", "gemma2", "gemma3_text", "smollm3"})  # where config.json may leave the setting out
NORMS = {"gemma2": 4, "gemma3_text": 4}  # of a block, each as wide as the hidden state; else 2
HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3_text"})  # queries and keys are normalised per head
EXPERT_INNER = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}
FAMILIES = frozenset({"llama", "mistral", "qwen2", "phi3", "granite"}) | TIED | HEAD_NORMS | EXPERT_INNER.keys()


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, which LoRA can sit on. name: its path in the block."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        return self.weights + self.out_features * self.bias


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of a block's feed-forward layers."""

    count: int
    used: int  # by one token
    hidden: int
    inner: int  # of one expert

    @property
    def weights(self) -> int:
        """Of one expert: gate, up, down."""
        return 3 * self.hidden * self.inner

    @property
    def router(self) -> int:
        return self.count * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """As PEFT 0.21 does it for all-linear: a rank for each expert, twice that where gate and up are one tensor."""
        wide, narrow = 2 * rank * self.count, rank * self.count
        experts = lora_parameters(2 * self.inner, self.hidden, wide) + lora_parameters(self.hidden, self.inner, narrow)
        return experts + lora_parameters(self.count, self.hidden, rank)


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose blocks are all alike."""

    hidden: int
    inner: int  # width of what one token goes through in the feed-forward layers
    layers: int
    vocab: int
    heads: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    tied_embeddings: bool
    linears: tuple[Linear, ...]  # of one block
    norms: int  # norm parameters of one block
    experts: Experts | None = None

    @property
    def embeddings(self) -> int:
        """Token embeddings, and the head where it is a matrix of its own."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers in the blocks: what 4-bit loading quantizes."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def expert_weights(self) -> int:
        experts = self.experts
        return self.layers * (experts.count * experts.weights + experts.router) if experts else 0

    @property
    def parameters(self) -> int:
        block = sum(linear.parameters for linear in self.linears) + self.norms
        return self.embeddings + self.layers * block + self.expert_weights + self.hidden

    @property
    def multiplied(self) -> int:
        """Weights that one token is multiplied with: blocks (of experts the used ones) and head."""
        experts = self.experts
        used = self.layers * (experts.used * experts.weights + experts.router) if experts else 0
        return self.linear_weights + used + self.vocab * self.hidden


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """From config.json. Raises ConfigError for a model family whose layers are not known here."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"Models of type '{family}' cannot be counted; known: {', '.join(sorted(FAMILIES))}.")
    try:
        hidden, heads, layers, vocab, inner = (
            int(config[name])
            for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
        )
        experts = _experts(str(family), config, hidden)
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"config.json lacks what a {family} model needs: {exc}") from exc
    head = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    return ModelShape(
        hidden=hidden,
        inner=experts.used * experts.inner if experts else inner,
        layers=layers,
        vocab=vocab,
        heads=heads,
        queries=queries,
        keys=keys,
        tied_embeddings=bool(config.get("tie_word_embeddings", family in TIED)),
        linears=_linears(str(family), config, hidden, queries, keys, None if experts else inner),
        norms=NORMS.get(str(family), 2) * hidden + (2 * head if family in HEAD_NORMS else 0),
        experts=experts,
    )


def _linears(
    family: str, config: Mapping[str, Any], hidden: int, queries: int, keys: int, inner: int | None
) -> tuple[Linear, ...]:
    """inner: None where experts stand in for the feed-forward layers."""
    bias = family == "qwen2" or bool(config.get("attention_bias"))
    out = Linear("self_attn.o_proj", hidden, queries, bias and family != "qwen2")
    mlp_bias = bool(config.get("mlp_bias"))
    if family == "phi3":  # queries, keys and values in one matrix, gate and up in another
        wide = 2 * (inner or 0)
        return (
            Linear("self_attn.qkv_proj", queries + 2 * keys, hidden),
            out,
            Linear("mlp.gate_up_proj", wide, hidden),
            Linear("mlp.down_proj", hidden, wide // 2),
        )
    attention = (
        Linear("self_attn.q_proj", queries, hidden, bias),
        Linear("self_attn.k_proj", keys, hidden, bias),
        Linear("self_attn.v_proj", keys, hidden, bias),
        out,
    )
    if inner is None:
        return attention
    return (
        *attention,
        Linear("mlp.gate_proj", inner, hidden, mlp_bias),
        Linear("mlp.up_proj", inner, hidden, mlp_bias),
        Linear("mlp.down_proj", hidden, inner, mlp_bias),
    )


def _experts(family: str, config: Mapping[str, Any], hidden: int) -> Experts | None:
    """Raises ConfigError where only some of the blocks have experts, KeyError."""
    if family not in EXPERT_INNER:
        return None
    if config.get("mlp_only_layers") or int(config.get("decoder_sparse_step") or 1) != 1:
        raise ConfigError("Models with experts in some of their blocks only cannot be counted.")
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"  # both are written, by version
    count, inner = int(config[name]), int(config[EXPERT_INNER[family]])
    return Experts(count, int(config["num_experts_per_tok"]), hidden, inner)


def lora_parameters(out_features: int, in_features: int, rank: int) -> int:
    """A [rank, in] and B [out, rank]."""
    return rank * (out_features + in_features)


def targeted(shape: ModelShape, target_modules: Targets) -> tuple[Linear, ...]:
    """The linear layers of a block that get an adapter. Raises ConfigError when a target is none of the model's layers."""
    if target_modules == "all-linear":
        return shape.linears
    found = {target: [one for one in shape.linears if _ends_with(one.name, target)] for target in target_modules}
    if unknown := sorted(target for target, linears in found.items() if not linears):
        names = ", ".join(linear.name.rpartition(".")[2] for linear in shape.linears)
        raise ConfigError(f"The model has no layers {', '.join(unknown)}; it has {names}.")
    return tuple(one for one in shape.linears if any(one in linears for linears in found.values()))


def adapter_parameters(
    shape: ModelShape,
    rank: int,
    target_modules: Targets,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    dora: bool = False,
) -> int:
    """What a LoRA trains. rank_pattern: other ranks, by the end of a layer's name or a pattern for it, as PEFT reads it.

    dora: a magnitude for each output as well. Raises ConfigError when a target is none of the model's layers.
    """
    linears = targeted(shape, target_modules)
    others = sum(linear.out_features for linear in linears) * shape.layers if dora else 0
    if shape.experts is not None and target_modules == "all-linear":
        if dora:
            raise ConfigError("PEFT trains no DoRA on experts: name the attention layers under lora.target_modules.")
        others += shape.layers * shape.experts.lora_parameters(rank)
    ranks = _ranks(shape, linears, rank, rank_pattern or {})
    return sum(lora_parameters(linear.out_features, linear.in_features, r) for linear, r in ranks) + others


def _ranks(
    shape: ModelShape, linears: tuple[Linear, ...], rank: int, pattern: Mapping[str, int]
) -> Iterator[tuple[Linear, int]]:
    for layer in range(shape.layers):
        for linear in linears:
            name = f"model.layers.{layer}.{linear.name}"
            found = (r for key, r in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
            yield linear, next(found, rank)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
