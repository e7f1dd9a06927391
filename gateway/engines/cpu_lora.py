"""Keeps adapters away from the base model on vLLM's CPU backend. vLLM calls `mend` in each of its processes.

vLLM marks a token that belongs to no adapter with the slot index -1. Its GPU kernels skip such tokens; its CPU functions (0.32)
use the index as it is, and -1 is the last slot: a base-model request is computed with whatever adapter sits there, another
tenant's included. The first half of every update, x·Aᵀ, passes through one function; zeroed rows there stay zero.
"""

from typing import Any


def mend() -> None:
    """Replace `bgmv_shrink` wherever the CPU backend looks it up. Does nothing on other devices, or a second time."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if punica_cpu.bgmv_shrink is not lora_ops.bgmv_shrink:
        raise RuntimeError("vLLM's CPU LoRA has changed: gateway.engines.cpu_lora must be looked at again.")
    if not hasattr(lora_ops.bgmv_shrink, "spares_the_base"):
        lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = sparing_the_base(lora_ops.bgmv_shrink)


def sparing_the_base(shrink: Any) -> Any:
    """The same function with zeros for tokens of no adapter.

    inputs: [tokens, in_features], lora_weights: [slots, 1, rank, in_features], output: [tokens, rank], indices: [tokens].
    """

    def bgmv_shrink(inputs: Any, lora_weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, lora_weights, output, indices, scaling)
        output[indices < 0] = 0

    bgmv_shrink.spares_the_base = True  # type: ignore[attr-defined]
    return bgmv_shrink
