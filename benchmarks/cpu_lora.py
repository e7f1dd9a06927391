"""The adapter's part of one fused linear layer on a CPU: vLLM's own functions against ours (gateway/engines/cpu_lora.py).

    python -m benchmarks.cpu_lora

Shapes are those of SmolLM2-135M's gate_up_proj, rank 16, eight slots, bfloat16, one thread. Both are given the same tensors and
take turns; no engine runs.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

from benchmarks.common import interval, percentile, save
from gateway.engines.cpu_lora import Batch

SLOTS, RANK, INPUTS, WIDTHS = 8, 16, 576, (1536, 1536)
BATCHES = {
    "one answer going on": [0],
    "eight going on, eight adapters": list(range(8)),
    "eight going on, one adapter": [3] * 8,
    "a prompt of 200 tokens": [5] * 200,
    "a prompt of 200 beside seven going on": [5] * 200 + [0, 1, 2, 3, 4, 6, 7],
}


def both(slots: list[int]) -> tuple[Callable[[], None], Callable[[], None]]:
    """vLLM's way and ours to add one batch's updates."""
    kind = torch.bfloat16
    x, y = torch.randn(len(slots), INPUTS, dtype=kind), torch.zeros(len(slots), sum(WIDTHS), dtype=kind)
    a = [torch.randn(SLOTS, 1, RANK, INPUTS, dtype=kind) / INPUTS for _ in WIDTHS]
    b = [torch.randn(SLOTS, 1, width, RANK, dtype=kind) / RANK for width in WIDTHS]
    indices, batch = torch.tensor(slots), Batch(slots)

    def theirs() -> None:
        start = 0
        for a_slots, b_slots, width in zip(a, b, WIDTHS, strict=True):
            reduced = torch.zeros(len(slots), RANK)
            bgmv_shrink(x, a_slots, reduced, indices, 1.0)
            bgmv_expand_slice(reduced, b_slots, y, indices, start, width)
            start += width

    return theirs, lambda: batch.add_updates(x, y, a, b, WIDTHS, 1.0)


def microseconds(call: Callable[[], None], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    shown = Table("batch", "vLLM P50", "ours P50", "ratio", title="microseconds a layer")
    found = {}
    for name, slots in track(BATCHES.items(), description="batches", console=Console(stderr=True)):
        calls, times = both(slots), 3 if len(slots) > 100 else 50
        for call in calls:
            call()
        pairs = [
            tuple(microseconds(call, times) for call in (calls if turn % 2 else calls[::-1])) for turn in range(rounds)
        ]
        pairs = [pair if turn % 2 else pair[::-1] for turn, pair in enumerate(pairs)]
        theirs, ours = zip(*pairs, strict=True)
        value, low, high = interval([mine / other for other, mine in pairs])
        found[name] = {"vllm_us": theirs, "ours_us": ours, "ratio": {"value": value, "low": low, "high": high}}
        middle = f"{percentile(theirs, 0.5):.0f}", f"{percentile(ours, 0.5):.0f}"
        shown.add_row(name, *middle, f"{value:.2f} ({low:.2f} … {high:.2f})")
    path = save("cpu_lora", {"command": "python -m benchmarks.cpu_lora", "batches": found})
    Console().print(shown, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
