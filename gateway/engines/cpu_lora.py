"""LoRA on vLLM's CPU backend, so that no request meets another tenant's adapter. vLLM calls `mend` in each of its processes.

vLLM marks a token that belongs to no adapter with the slot -1. Its GPU kernels skip such tokens; its CPU functions (0.32) use
the number as an index, and -1 is the last slot: a base-model request is computed with whatever adapter sits there. They also
copy an adapter's weights once for every token of a prompt. Here tokens of no adapter are left out, and a run of tokens of one
adapter is multiplied with that adapter's weights where they lie.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

NO_ADAPTER = -1
LONG_RUN = 8  # tokens from which on one multiplication for a run is cheaper than its share of a common one
FEW_RUNS = 2  # runs up to which it always is


class Batch:
    """Which tokens of a batch go through which slot's adapter. slots: one for each token."""

    def __init__(self, slots: Sequence[int]) -> None:
        import torch

        runs, start = [], 0
        for slot, tokens in groupby(slots):
            end = start + len(list(tokens))
            if slot != NO_ADAPTER:
                runs.append((start, end, slot))
            start = end
        self.runs, scattered = [], []
        for start, end, slot in runs:
            if end - start >= LONG_RUN or len(runs) <= FEW_RUNS:
                self.runs.append((start, end, slot))
            else:
                scattered += [(row, slot) for row in range(start, end)]
        self.rows = torch.tensor([row for row, _ in scattered], dtype=torch.long)
        self.slots = torch.tensor([slot for _, slot in scattered], dtype=torch.long)
        self.order = torch.arange(len(scattered))

    def add_updates(
        self, x: Any, y: Any, a: Sequence[Any], b: Sequence[Any], widths: Sequence[int], scale: float
    ) -> None:
        """Add scale·x·Aᵀ·Bᵀ to y in place, each token with its own slot's A and B.

        x: [tokens, in]; y: [tokens, sum of widths], side by side the outputs of the linear layers that vLLM fuses;
        a: for each of them [slots, 1, rank, in]; b: [slots, 1, width, rank]. No other slot's values enter a token's result,
        not even times zero, which would let a NaN through.
        """
        start = 0
        for a_slots, b_slots, width in zip(a, b, widths, strict=True):
            out = y[:, start : start + width]
            for first, end, slot in self.runs:
                reduced = x[first:end] @ a_slots[slot, 0].T
                out[first:end].addmm_(reduced, b_slots[slot, 0].T, alpha=scale)
            if len(self.rows):
                # through every slot: cheaper than gathering one for each
                reduced = x[self.rows] @ a_slots.flatten(0, 2).T
                reduced = reduced.unflatten(1, (len(a_slots), -1))[self.order, self.slots]
                updates = (b_slots[self.slots, 0] @ reduced.unsqueeze(2)).squeeze(2)
                out.index_add_(0, self.rows, updates, alpha=scale)
            start += width


def mend() -> None:
    """Compute adapters our way on the CPU backend. Does nothing on other devices."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.punica_wrapper import punica_cpu

    class Punica(punica_cpu.PunicaWrapperCPU):  # type: ignore[misc]
        batch = Batch(())

        def update_metadata(self, *args: Any, **kwargs: Any) -> None:
            super().update_metadata(*args, **kwargs)
            self.batch = Batch(self.token_lora_indices.tolist())

        def add_lora_linear(
            self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **_: Any
        ) -> None:
            flat_x, flat_y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            self.batch.add_updates(flat_x, flat_y, lora_a_stacked, lora_b_stacked, output_slices, scale)

    punica_cpu.PunicaWrapperCPU = Punica
