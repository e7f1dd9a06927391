"""Publish a DoRA, or another kind of adapter that PEFT can convert, as a plain LoRA that engines share, behind a parity gate.

DoRA rescales each row of W₀ + s·B·A, so its update D·(W₀ + s·B·A) − W₀ has no small rank; what is written is the nearest LoRA
of the rank that was asked for, layer by layer.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adapters.base import Report, open_checkpoint, read_base, silent
from adapters.derive import Derived, Parent, publish_copy
from adapters.errors import InvalidAdapterError, MergeError
from adapters.factors import Factors
from adapters.manifest import read_manifest
from adapters.merge import MergedWeights, check_adapter, plan_updates
from adapters.parity import check_memory, load_model, quietly, torch_and_peft
from adapters.peft_format import WEIGHTS_FILE, load_config, lora_config, parse_tensor_name, version_digest
from adapters.tensors import open_tensors

POWER_ITERATIONS = 8  # of the randomised SVD (Halko et al. 2011): the spectrum of D·W₀ falls slowly
OVERSAMPLING = 16


def read_convertible(name: str, folder: Path, base: Path) -> Parent:
    """An adapter to convert, of any kind PEFT knows. Raises MergeError for one of another base, or a LoRA."""
    raw = load_config(folder)
    info = read_base(base)
    if raw.get("peft_type") == "LORA":
        manifest = check_adapter(folder, base, info)
        if not raw.get("use_dora"):
            raise MergeError(f"{name} is a LoRA already. To reduce its rank: lorikeet fit")
    else:
        try:
            manifest = read_manifest(folder)
        except InvalidAdapterError as exc:
            raise MergeError(f"{name}: {exc.faults[0].message}") from exc
        if manifest is not None and manifest.base.weights_digest != info.fingerprint.weights_digest:
            raise MergeError(
                f"{name} was trained on {manifest.base.model}, whose weights are not those of {info.name}."
            )
    return Parent(name, folder, version_digest(folder), manifest)


def convert_adapter(
    base: Path,
    parent: Parent,
    out: Path,
    *,
    rank: int,
    name: str,
    accept: str = "",
    prompts: Path | None = None,
    report: Report = silent,
) -> Derived:
    """Write the nearest LoRA to `out`. Raises MergeError, ParityError when it does not do what its original does."""
    kind = str(load_config(parent.folder).get("peft_type"))
    found = (
        _of_dora(base, parent.folder, rank, report) if kind == "LORA" else _by_peft(base, parent.folder, rank, report)
    )
    factors: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for module, each, error in found:
        factors[module] = each
        if error is not None:
            errors[module] = error
    return publish_copy(
        base,
        parent,
        factors,
        out,
        name=name,
        method=f"{'DoRA' if kind == 'LORA' else kind} as LoRA of rank {rank}",
        errors=errors,
        accept=accept,
        prompts=prompts,
        report=report,
    )


def _of_dora(base: Path, adapter: Path, rank: int, report: Report) -> Iterator[tuple[str, Factors, float | None]]:
    import torch

    weights, tensors = open_tensors(adapter / WEIGHTS_FILE), open_checkpoint(base)
    updates = plan_updates(weights, tensors)
    if any("whole" in update.names for update in updates.values()):
        raise MergeError("The adapter holds whole modules or biases, which no LoRA can stand for. Merge it instead.")
    merged = MergedWeights(tensors, weights, lora_config(load_config(adapter)), updates)
    torch.manual_seed(0)
    for done, (tensor, value) in enumerate(merged.changed()):
        report("converting", done, len(updates))
        delta = torch.from_numpy(value - tensors[tensor].read(tensor).astype(np.float32))
        u, s, v = torch.svd_lowrank(delta, q=min(rank + OVERSAMPLING, *delta.shape), niter=POWER_ITERATIONS)
        root = s[:rank].sqrt()
        nearest = Factors((v[:, :rank] * root).T.numpy(), (u[:, :rank] * root).numpy())
        left = torch.linalg.norm(delta - torch.from_numpy(nearest.b @ nearest.a)) / torch.linalg.norm(delta).clamp_min(
            1e-30
        )
        yield tensor.removesuffix(".weight"), nearest, float(left)


def _by_peft(base: Path, adapter: Path, rank: int, report: Report) -> Iterator[tuple[str, Factors, float | None]]:
    check_memory(open_checkpoint(base))
    torch, peft = torch_and_peft()
    report("converting with PEFT", 0, 0)
    with quietly():
        try:
            model = peft.PeftModel.from_pretrained(load_model(base, torch.float32), adapter)
            _, tensors = peft.convert_to_lora(model, rank=rank)
        except (TypeError, ValueError, KeyError, RuntimeError) as exc:
            raise MergeError(f"PEFT cannot convert {adapter.name} to a LoRA: {exc}") from exc
    for name, tensor in tensors.items():
        parsed = parse_tensor_name(name)
        if parsed is not None and parsed.side == "A":
            other = tensors[name.replace(".lora_A.", ".lora_B.")]
            yield parsed.module, Factors(tensor.float().cpu().numpy(), other.float().cpu().numpy()), None
