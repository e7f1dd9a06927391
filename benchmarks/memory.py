"""Peak memory of real training runs against `lorikeet estimate`, on this machine's CPU.

    python -m benchmarks.memory [--case lora-bf16]… [--steps 2]

Each case trains SmolLM2-135M in a process of its own, as `lorikeet train` does: the same run, short. What is measured: the
process imports torch, transformers, peft, trl and the trainer's methods and renders the rows; then the kernel's high-water
mark of resident memory (VmHWM) is reset through /proc/self/clear_refs, and read again with each report of the training until
the adapter is about to be written. Peak minus the resident memory at the reset is the run's own. The weights' file, which the
process maps, is part of it. The estimate is that of `trainer.estimate` for a CPU without the part "imports".
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import ROOT, save

MIB = 2**20
ROWS = 12
BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Case:
    """One run: `batch` rows of exactly `length` tokens, half of them answer."""

    name: str
    batch: int
    length: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}-{self.batch}x{self.length}"


KINDS: dict[str, dict[str, Any]] = {
    "lora-bf16": {},
    "lora-bf16-checkpointing": {"gradient_checkpointing": True},
    "lora-fp32": {"precision": "fp32"},
    "dora-bf16": {"lora": {"dora": True}},
    "qlora-bf16": {"tuning": "qlora"},
    "full-bf16": {"tuning": "full"},
    "full-bf16-checkpointing": {"tuning": "full", "gradient_checkpointing": True},
    "full-fp32": {"tuning": "full", "precision": "fp32"},
}
SHAPES = ((4, 128), (2, 384))
CASES = [
    *(Case(name, batch, length, settings) for name, settings in KINDS.items() for batch, length in SHAPES),
    Case("lora-bf16", 1, 1024),  # beyond 512 tokens attention is fused on a CPU too
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", action="append", help="Only cases whose name begins so. Repeatable.")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(run_case(CASES[int(arguments.child)], arguments.steps)))  # noqa: T201
        return
    console = Console(stderr=True)
    found = []
    wanted = [
        index for index, case in enumerate(CASES) if not arguments.case or case.key.startswith(tuple(arguments.case))
    ]
    with Progress(console=console) as progress:
        task = progress.add_task("cases", total=len(wanted))
        for index in wanted:
            progress.update(task, description=CASES[index].key)
            command = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                "--child",
                str(index),
                "--steps",
                str(arguments.steps),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            ratio = found[-1]["estimated_bytes"] / found[-1]["measured_bytes"]
            progress.print(
                f"{found[-1]['case']}: {found[-1]['measured_bytes'] / MIB:.0f} MiB, estimated {ratio:.2f} of it"
            )
            progress.advance(task)
    ratios = [each["estimated_bytes"] / each["measured_bytes"] for each in found]
    summary = {"lowest_ratio": round(min(ratios), 3), "highest_ratio": round(max(ratios), 3)}
    if not arguments.case:
        command_line = "python -m benchmarks.memory"
        save("memory", {"command": command_line, "steps": arguments.steps, "summary": summary, "cases": found})
    table = Table("case", "measured MiB", "estimated MiB", "estimated / measured", *found[0]["parts"])
    for each, ratio in zip(found, ratios, strict=True):
        parts = [f"{each['parts'].get(part, 0) / MIB:.0f}" for part in found[0]["parts"]]
        measured, estimated = each["measured_bytes"] / MIB, each["estimated_bytes"] / MIB
        table.add_row(each["case"], f"{measured:.0f}", f"{estimated:.0f}", f"{ratio:.2f}", *parts)
    Console(width=240).print(table, summary)


def run_case(case: Case, steps: int) -> dict[str, Any]:
    """Train it in this process. Bytes."""
    from adapters.home import home
    from trainer.config import TrainConfig
    from trainer.estimate import RowFacts, estimate_run
    from trainer.plan import resolve_base
    from trainer.run import run_training, wait_patiently
    from trainer.shape import read_shape
    from trainer.template import load_renderer

    wait_patiently()
    place = home()
    base, _ = resolve_base(BASE, place)
    with tempfile.TemporaryDirectory(prefix="lorikeet-memory-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        renderer = load_renderer(base)
        lines = [json.dumps({"messages": row_of(renderer, case.length, number)}) for number in range(ROWS)]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = TrainConfig.model_validate(
            {
                "name": "memory",
                "base": str(base),
                "data": {"train": str(rows), "licence": "CC0-1.0"},
                "max_tokens": case.length,
                "optimizer": {"batch_rows": case.batch, "max_steps": steps, "evaluations": 1},
                "goldens": 0,
                **case.settings,
            }
        )
        import_everything()
        gc.collect()
        before = status()["VmRSS"]
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
        peak = 0

        def listen(step: str, progress: Any) -> None:
            nonlocal peak
            if progress is not None:
                peak = status()["VmHWM"]

        run_training(config, place, Path(scratch) / "run", relative_to=Path(scratch), listen=listen)
    shape = read_shape(json.loads((base / "config.json").read_text(encoding="utf-8")))
    facts = RowFacts(ROWS, case.length, case.length, 0.5)
    expected = estimate_run(config, shape, [facts], machine="cpu")
    parts = {name: size_bytes for name, size_bytes in expected.memory_bytes.items() if name != "imports"}
    return {
        "case": case.key,
        "settings": case.settings,
        "imports_bytes": before,
        "measured_bytes": peak - before,
        "estimated_bytes": sum(parts.values()),
        "parts": parts,
    }


def row_of(renderer: Any, length: int, number: int) -> list[dict[str, str]]:
    """A conversation of exactly `length` tokens, about half of them answer."""
    words = "river market engine letter garden signal winter bridge".split()
    answer = " ".join(words[(number + index) % len(words)] for index in range(length // 2 - 2))
    for asked in range(length):
        question = " ".join(
            words[(number * 3 + index) % len(words)] for index in range(max(1, length // 2 - 60) + asked)
        )
        row = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if len(renderer.render(row).input_ids) == length:
            return row
    raise RuntimeError(f"no row of {length} tokens was found")


def import_everything() -> None:
    """What a run loads of Python and of shared libraries."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import trainer.methods.sft  # noqa: F401

    torch.ones(8, 8) @ torch.ones(8, 8)


def status() -> dict[str, int]:
    """Bytes of /proc/self/status."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in lines if value.strip().endswith("kB")}


if __name__ == "__main__":
    main()
