"""Fold an adapter into its base: W = W₀ + (alpha / rank)·B·A in float32, cast last, and proof that nothing else changed.

Weights are merged a tensor at a time with numpy, so any model that fits the disk can be merged. The proof needs torch: base
+ adapter through PEFT is compared with the merged weights, before and after they were cast and saved. A result outside the
tolerance is not kept.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseModelInfo, BaseSpec, Report, describe_base, open_checkpoint, read_base, silent, write_base
from adapters.errors import InvalidAdapterError, MergeError, ParityError
from adapters.licences import PROMOTION, Verdict
from adapters.manifest import Manifest, read_manifest
from adapters.parity import Divergence, measure_parity, sample_prompts
from adapters.peft_format import WEIGHTS_FILE, LoraConfig, load_config, lora_config, parse_tensor_name, version_digest
from adapters.tensors import DTYPES, TensorFile, TensorSpec, open_tensors, write_tensors
from adapters.validation import EngineLimits, validate_adapter

REPORT_FILE = "merge-report.json"
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Faults that keep an adapter from a shared engine but not from a base of its own.
MERGEABLE = frozenset({"dora", "bias", "modules_to_save", "embeddings"})
NO_LIMITS = EngineLimits(max_rank=1 << 16)


@dataclass(frozen=True)
class Tolerance:
    """How far log-probabilities of the same tokens may be apart, in nats, and how often the first choice must be equal.

    float32 differs by summation order only (1e-4 in logits was seen). What is saved in 16 bits may differ from float32 by
    a multiple of what the unmerged adapter differs when it runs in those 16 bits, which is the price of the dtype itself.
    """

    fp32_max: float = 2e-3
    fp32_top1: float = 0.99
    saved_mean_floor: float = 0.02
    saved_over_unmerged: float = 2.0  # 0.8 to 1.1 measured on SmolLM2-135M, updates of 2 to 30 % of the weights


@dataclass(frozen=True)
class ParityReport:
    """What was merged, and how equal the result is to base + adapter in float32."""

    out: str
    base: str
    adapter_digest: str
    layers: int
    dtype: str  # in which the merged weights are saved
    prompts: str  # goldens, default prompts or random tokens
    tokens: int
    fp32: Divergence  # merged weights in float32
    saved: Divergence  # merged weights read back from the disk, run in their dtype
    unmerged: Divergence  # base + adapter, run in that dtype: the noise `saved` is judged by
    effect: Divergence  # the base alone: how much there was to get wrong

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Update:
    """The adapter's tensors that change one tensor of the base."""

    names: dict[str, str] = field(default_factory=dict)  # "A", "B", "magnitude", or "whole" -> tensor


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tolerance: Tolerance | None = None,
    report: Report = silent,
) -> ParityReport:
    """Write the merged model to `out`, a prepared base model of its own. dtype: float32, bfloat16, float16; default: kept.

    Raises MergeError for what cannot be merged, ParityError when the result is not equal; both leave no `out` behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists already. Give a folder that does not.")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise MergeError(f"'{dtype}' is no dtype to save in. Use one of {', '.join(DTYPE_NAMES)}.")
    info = read_base(base)
    manifest = _check(adapter, info)
    config = lora_config(load_config(adapter))
    weights = open_tensors(adapter / WEIGHTS_FILE)
    tensors = open_checkpoint(base)
    updates = plan_updates(weights, tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        merged = MergedWeights(tensors, weights, config, updates)
        saved_dtype = _write_weights(merged, folder, dtype, report)
        _copy_rest(base, folder, saved_dtype)
        prompts = sample_prompts(base, info, manifest)
        parity = measure_parity(base, adapter, folder, merged.changed(), prompts, saved_dtype, report)
        result = ParityReport(
            out=str(out),
            base=info.fingerprint.model,
            adapter_digest=version_digest(adapter),
            layers=len(updates),
            dtype=saved_dtype,
            prompts=prompts.source,
            tokens=prompts.tokens,
            **parity,
        )
        judge(result, tolerance or Tolerance())
        _write_card(folder, info, manifest, result)
        stem = (manifest.name if manifest else info.name)[:40].rstrip("._-")
        name = f"{stem}-merged-{result.adapter_digest[:8]}"
        spec = BaseSpec(name=name, model=name, licence=info.licence, folder=out.absolute())
        write_base(folder, describe_base(folder, spec, report))
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return result


def judge(result: ParityReport, tolerance: Tolerance) -> None:
    """Raises ParityError with the figures when the merged model is not base + adapter."""
    allowed = max(tolerance.saved_mean_floor, tolerance.saved_over_unmerged * result.unmerged.mean_abs)
    reasons = []
    # Written so that NaN fails.
    if not result.fp32.max_abs <= tolerance.fp32_max:
        reasons.append(
            f"in float32 a log-probability is off by {result.fp32.max_abs:.2g} (limit {tolerance.fp32_max:g})"
        )
    if not result.fp32.top1 >= tolerance.fp32_top1:
        reasons.append(f"in float32 only {result.fp32.top1:.1%} of the first choices are equal")
    if not result.saved.mean_abs <= allowed:
        reasons.append(
            f"saved in {result.dtype} log-probabilities are off by {result.saved.mean_abs:.2g} on average (limit "
            f"{allowed:.2g}; the unmerged adapter in {result.dtype}: {result.unmerged.mean_abs:.2g})"
        )
    if reasons:
        raise ParityError(f"The merged model is not base + adapter, and was not kept: {'; '.join(reasons)}.")


@dataclass(frozen=True)
class MergedWeights:
    """The base's tensors with the adapter folded in, each computed when it is asked for."""

    base: Mapping[str, TensorFile]
    adapter: TensorFile
    config: LoraConfig
    updates: Mapping[str, _Update]  # by name of the base's tensor

    def read(self, name: str, dtype: str) -> NDArray[Any]:
        """One tensor, merged in float32 where the adapter touches it, then cast."""
        tensor = self.base[name].read(name)
        update = self.updates.get(name)
        if update is None:
            return tensor if tensor.dtype.kind in "iub" else tensor.astype(DTYPES[dtype])
        with np.errstate(over="ignore"):
            cast = self._merged(name, tensor, update).astype(DTYPES[dtype])
        if not np.isfinite(cast.astype(np.float32)).all():
            raise MergeError(f"{name} is not finite in {dtype} after the merge. Save in bfloat16 or float32.")
        return cast

    def changed(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every tensor the adapter touches, in float32."""
        for name, update in self.updates.items():
            yield name, self._merged(name, self.base[name].read(name), update)

    def _merged(self, name: str, tensor: NDArray[Any], update: _Update) -> NDArray[Any]:
        if "whole" in update.names:  # modules_to_save, biases
            return self.adapter.read(update.names["whole"]).astype(np.float32)
        a, b = (self.adapter.read(update.names[side]).astype(np.float32) for side in ("A", "B"))
        scale = np.float32(self.config.scale_of(name.removesuffix(".weight")))
        merged: NDArray[Any] = tensor.astype(np.float32) + scale * (b @ a)
        if "magnitude" in update.names:  # DoRA (Liu et al. 2024, equation 5): each row scaled to a trained length
            magnitude = self.adapter.read(update.names["magnitude"]).astype(np.float32)
            merged *= (magnitude.reshape(-1) / np.linalg.norm(merged, axis=1))[:, None]
        return merged


def _check(adapter: Path, info: BaseModelInfo) -> Manifest | None:
    """The adapter's manifest. Raises MergeError unless validation finds nothing that also keeps it from being merged."""
    try:
        return validate_adapter(adapter, info, NO_LIMITS).manifest
    except InvalidAdapterError as exc:
        serious = [fault for fault in exc.faults if fault.code not in MERGEABLE]
        if serious:
            raise MergeError(
                f"The adapter cannot be merged into {info.name}: " + " ".join(fault.message for fault in serious)
            ) from exc
    return read_manifest(adapter)


def plan_updates(weights: TensorFile, base: Mapping[str, TensorFile]) -> dict[str, _Update]:
    """Which tensor of the base each tensor of the adapter changes. Raises MergeError for one that changes none."""
    updates: dict[str, _Update] = {}
    strange: list[str] = []
    for name, info in weights.tensors.items():
        parsed = parse_tensor_name(name)
        plain = name.removeprefix("base_model.model.")
        if parsed is not None:
            target, role = f"{parsed.module}.weight", str(parsed.side)
        elif ".lora_magnitude_vector" in name:
            target, role = plain.split(".lora_magnitude_vector")[0] + ".weight", "magnitude"
        else:
            target, role = plain, "whole"
        if target not in base or (role == "whole" and base[target].tensors[target].shape != info.shape):
            strange.append(name)
        else:
            updates.setdefault(target, _Update()).names[role] = name
    if strange:
        raise MergeError(
            f"The base has no tensor that {strange[0]} could change ({len(strange)} of that kind): tied embeddings, new "
            "tokens and LoRA on embeddings cannot be merged."
        )
    return updates


def _write_weights(merged: MergedWeights, folder: Path, dtype: str | None, report: Report) -> str:
    """Shard by shard under the base's own file names; the name of the dtype most bytes are saved in."""
    names = {short: name for name, short in DTYPE_NAMES.items()}
    shards = {file.path.name: file for file in merged.base.values()}
    done, total = 0, len(merged.base)
    sizes: dict[str, int] = {}

    def produce(name: str) -> NDArray[Any]:
        nonlocal done
        done += 1
        report("merging", done, total)
        return merged.read(name, saved[name])

    for file_name, shard in sorted(shards.items()):
        saved = {
            name: DTYPE_NAMES[dtype] if dtype and info.dtype in names else info.dtype
            for name, info in shard.tensors.items()
        }
        specs = [TensorSpec(name, saved[name], info.shape) for name, info in shard.tensors.items()]
        write_tensors(folder / file_name, specs, produce, {"format": "pt"})
        for spec in specs:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size_bytes
    most = max(sizes, key=lambda short: sizes[short])
    if most not in names:
        raise MergeError(f"The base is quantized ({most}). Merge into its unquantized checkpoint, then quantize again.")
    return names[most]


def _copy_rest(base: Path, folder: Path, dtype: str) -> None:
    """Tokenizer, template, generation and model configuration."""
    left_out = {REPORT_FILE, "lorikeet-base.json", "README.md"}
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in left_out:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {"total_size": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, info: BaseModelInfo, manifest: Manifest | None, result: ParityReport) -> None:
    """README.md: where it came from, under which terms, and how equal it is."""
    licences = [f"- base {info.fingerprint.model}: {info.licence}"]
    verdict: Verdict | None = None
    if manifest is not None:
        verdict = manifest.judge_licences(PROMOTION, base_licence=info.licence)
        licences += [f"- data {data.name} ({data.rows} rows): {data.licence}" for data in manifest.data]
        licences += [f"- teacher {data.teacher.name}: {data.teacher.licence}" for data in manifest.data if data.teacher]
        licences += ["", f"Together: {verdict.level}.", "", *(f"- {line}" for line in verdict.lines())]
    else:
        licences.append("- training data: not known, the adapter came without a manifest")
    rows = [
        ("merged, float32", result.fp32),
        (f"merged, saved as {result.dtype}", result.saved),
        (f"not merged, run in {result.dtype}", result.unmerged),
        ("base without the adapter", result.effect),
    ]
    table = [f"| {name} | {value.max_abs:.2e} | {value.mean_abs:.2e} | {value.top1:.1%} |" for name, value in rows]
    revision = f" at revision {info.fingerprint.revision}" if info.fingerprint.revision else ""
    text = "\n".join(
        [
            f"# {manifest.name if manifest else 'Adapter'} merged into {info.name}",
            "",
            f"Base model {info.fingerprint.model}{revision}, weights `{info.fingerprint.weights_digest}`.",
            f"Adapter content `{result.adapter_digest}`, {result.layers} layers changed, made with `lorikeet merge`.",
            "",
            "## Licences",
            "",
            *licences,
            "",
            "## Parity",
            "",
            f"Against base + adapter in float32, on {result.tokens} tokens ({result.prompts}); differences of natural "
            "log-probabilities.",
            "",
            "| | largest | mean | same first choice |",
            "|---|---|---|---|",
            *table,
            "",
        ]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    report = {
        **result.as_dict(),
        "base_weights_digest": info.fingerprint.weights_digest,
        "base_licence": info.licence,
        "licences": verdict.model_dump(mode="json") if verdict else None,
        "manifest": manifest.model_dump(mode="json", exclude={"goldens"}) if manifest else None,
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
