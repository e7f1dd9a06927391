"""Peak memory and time of a merge, at two sizes of model.

    python -m benchmarks.merge_memory [--keep FOLDER]

The small model is the default base, SmolLM2-135M, in one file; the large one has the shape of a 1.2-billion-parameter Llama
in bfloat16, random weights, in shards of at most 640 MiB, written by this benchmark. Into each an adapter of rank 16 on every
linear layer is merged, with parity by weights, and into the small one with full parity too; each in a process of its own.
Measured is the kernel's high-water mark of resident memory (VmHWM), reset through /proc/self/clear_refs once everything is
imported, minus what was resident then.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.base import DEFAULT_BASE, BaseSpec, describe_base, find_base, open_checkpoint, write_base
from adapters.home import home
from adapters.tensors import TensorSpec, write_tensors
from benchmarks.common import ROOT, save
from benchmarks.memory import status
from tests.factories import TEMPLATE, make_adapter

MIB = 2**20
SHARD_BYTES = 640 * MIB  # the largest tensor, the embedding, takes 501
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 2048, 16, 32, 8, 8192, 128_256
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--keep", type=Path, help="Write models and results of merging here, and keep them.")
    parser.add_argument("--child", nargs=4, metavar=("BASE", "ADAPTER", "OUT", "PARITY"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        base, adapter, out, parity = asked.child
        print(json.dumps(run_case(Path(base), Path(adapter), Path(out), parity)))  # noqa: T201
        return
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="lorikeet-merge-memory-") as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("writing the large model", total=4)
            small, large = find_base(DEFAULT_BASE, home().models), folder / "large"
            if not (large / "lorikeet-base.json").is_file():
                write_model(large)
            cases = [("135M", small, "weights"), ("135M", small, "full"), ("1.2B", large, "weights")]
            found = []
            for name, base, parity in cases:
                progress.update(task, description=f"{name}, parity {parity}", advance=1)
                found.append({"model": name, "parity": parity, **facts(base), **measure(base, folder, parity)})
    path = save("merge_memory", {"command": "python -m benchmarks.merge_memory", "rank": RANK, "cases": found})
    table = Table(
        "model", "parity", "weights MiB", "largest shard MiB", "peak MiB", "peak / shard", "peak / weights", "s"
    )
    for each in found:
        peak = each["peak_bytes"]
        table.add_row(
            each["model"],
            each["parity"],
            f"{each['weights_bytes'] / MIB:.0f}",
            f"{each['largest_shard_bytes'] / MIB:.0f}",
            f"{peak / MIB:.0f}",
            f"{peak / each['largest_shard_bytes']:.2f}",
            f"{peak / each['weights_bytes']:.2f}",
            f"{each['seconds']:.1f}",
        )
    Console().print(table, f"Raw figures: {path}")


def facts(base: Path) -> dict[str, Any]:
    """Bytes of the whole model, of its largest shard and of its largest tensor."""
    tensors = open_checkpoint(base)
    sizes = [file.tensors[name].size_bytes for name, file in tensors.items()]
    shards = [path.stat().st_size for path in {file.path for file in tensors.values()}]
    return {
        "weights_bytes": sum(sizes),
        "shards": len(shards),
        "largest_shard_bytes": max(shards),
        "largest_tensor_bytes": max(sizes),
    }


def measure(base: Path, folder: Path, parity: str) -> dict[str, Any]:
    adapter, out = folder / "adapter", folder / "merged"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    make_adapter(adapter, base, rank=RANK, alpha=2 * RANK)
    command = [sys.executable, "-m", "benchmarks.merge_memory", "--child", str(base), str(adapter), str(out), parity]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_case(base: Path, adapter: Path, out: Path, parity: str) -> dict[str, Any]:
    """Merge in this process. Bytes and seconds."""
    from adapters.merge import merge_adapter

    if parity == "full":
        import peft  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM  # noqa: F401

        torch.ones(8, 8) @ torch.ones(8, 8)
    gc.collect()
    before = status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
    start = time.perf_counter()
    merge_adapter(base, adapter, out, parity="full" if parity == "full" else "weights")
    return {
        "before_bytes": before,
        "peak_bytes": status()["VmHWM"] - before,
        "seconds": round(time.perf_counter() - start, 2),
    }


def write_model(folder: Path) -> None:
    """A checkpoint of the large shape, a tensor in memory at a time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tile = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    shapes = dict(tensor_shapes())

    def produce(name: str) -> NDArray[Any]:
        if "norm" in name:
            return np.ones(shapes[name], ml_dtypes.bfloat16)
        return np.resize(tile, shapes[name])  # repeats it

    shards = list(packed(shapes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        specs = [TensorSpec(name, "BF16", shapes[name]) for name in names]
        write_tensors(folder / file, specs, produce, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "eos_token_id": 2,
    }
    for name, document in (
        ("config.json", config),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}),
        ("tokenizer_config.json", {}),
    ):
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    spec = BaseSpec(name="random-1.2b", model="benchmarks/random-1.2b", licence="CC0-1.0", folder=folder)
    write_base(folder, describe_base(folder, spec))


def tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def packed(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in order, as many to a shard as fit."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = TensorSpec(name, "BF16", shape).size_bytes
        if names and size + own > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


if __name__ == "__main__":
    main()
