"""Fold an adapter into its base: W = W₀ + (alpha / rank)·B·A in float32, cast last, and proof that nothing else changed.

Weights are merged a tensor at a time with numpy, so any model that fits the disk can be merged. The proof on log-probabilities
needs torch and the whole model in memory: base + adapter through PEFT is compared with the merged weights, before and after
they were cast and saved. Where the memory is too small for that, every saved tensor is held against its exact value instead.
A result outside the tolerance is not kept.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseModelInfo, BaseSpec, Report, describe_base, open_checkpoint, read_base, silent, write_base
from adapters.errors import InvalidAdapterError, MergeError, ParityError
from adapters.ladder import CARD_FILE, REPORT_FILE, Divergence, Limits, Rung, judge_rung, write_report
from adapters.licences import PROMOTION, Verdict, read_licence
from adapters.manifest import Manifest, read_manifest
from adapters.parity import Figures, Questions, Reference, check_memory, measure_parity, questions_for
from adapters.peft_format import WEIGHTS_FILE, LoraConfig, load_config, lora_config, parse_tensor_name, version_digest
from adapters.tensors import DTYPES, TensorFile, TensorSpec, open_tensors, write_tensors
from adapters.validation import EngineLimits, validate_adapter

Parity = Literal["full", "weights"]
Served = Callable[[Reference], Figures]
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
    fp32_kl: float = 1e-5  # 1e-8 measured
    saved_mean_floor: float = 0.02
    saved_over_unmerged: float = 2.0  # 0.8 to 1.1 measured on SmolLM2-135M, updates of 2 to 30 % of the weights
    saved_kl_floor: float = 5e-3
    served_over_unmerged: float = 3.0  # another engine sums in another order as well

    def merged(self) -> Limits:
        return Limits(max_abs=self.fp32_max, top1=self.fp32_top1, kl=self.fp32_kl)

    def saved(self, unmerged: Divergence) -> Limits:
        return self._over(unmerged, self.saved_over_unmerged)

    def served(self, unmerged: Divergence) -> Limits:
        return self._over(unmerged, self.served_over_unmerged)

    def _over(self, unmerged: Divergence, factor: float) -> Limits:
        """KL grows with the square of the noise."""
        return Limits(
            mean_abs=max(self.saved_mean_floor, factor * unmerged.mean_abs),
            kl=max(self.saved_kl_floor, factor**2 * (unmerged.kl or 0.0)),
        )


@dataclass(frozen=True)
class WeightCheck:
    """Saved tensors against their value in float64: what stands in for log-probabilities where the model is not loaded."""

    changed: int
    kept: int  # equal to the base's, bit for bit
    largest_error: float  # of a changed tensor's element, in units of the saved dtype's last place


@dataclass(frozen=True)
class ParityReport:
    """What was merged, and how equal the result is to base + adapter in float32."""

    out: str
    base: str
    adapter_digest: str
    layers: int
    dtype: str  # in which the merged weights are saved
    parity: Parity
    prompts: str = ""  # goldens, default prompts, a file's name or random tokens
    tokens: int = 0
    # Over all prompts together; none with parity "weights".
    fp32: Divergence | None = None  # merged weights in float32
    saved: Divergence | None = None  # merged weights read back from the disk, run in their dtype
    unmerged: Divergence | None = None  # base + adapter, run in that dtype: the noise `saved` is judged by
    effect: Divergence | None = None  # the base alone: how much there was to get wrong
    weights: WeightCheck | None = None
    notes: tuple[str, ...] = ()
    rungs: tuple[Rung, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rungs": [rung.model_dump(mode="json") for rung in self.rungs]}


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
    parity: Parity = "full",
    prompts: Path | None = None,
    served: tuple[str, Served] | None = None,
    report: Report = silent,
) -> ParityReport:
    """Write the merged model to `out`, a prepared base model of its own. dtype: float32, bfloat16, float16; default: kept.

    parity: "full" compares log-probabilities and greedy texts, with the model in memory; "weights" compares tensors, one at a
    time. prompts: JSONL to compare on besides the goldens. served: an engine's address, and what asks it.
    Raises MergeError for what cannot be merged, ParityError when the result is not equal; both leave no `out` behind. What a
    killed merge left is swept by the next one to the same place.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists already. Give a folder that does not.")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise MergeError(f"'{dtype}' is no dtype to save in. Use one of {', '.join(DTYPE_NAMES)}.")
    if parity == "weights" and (served or prompts):
        raise MergeError(
            "Parity by weights asks no model anything: leave served and prompts away, or choose full parity."
        )
    info = read_base(base)
    manifest = check_adapter(adapter, base, info)
    config = lora_config(load_config(adapter))
    weights = open_tensors(adapter / WEIGHTS_FILE)
    tensors = open_checkpoint(base)
    updates = plan_updates(weights, tensors, tied_vocabulary=info.vocab_size if info.tied_embeddings else None)
    if parity == "full":
        check_memory(tensors)
    with building(out) as folder:
        merged = MergedWeights(tensors, weights, config, updates)
        saved_dtype = _write_weights(merged, folder, dtype, report)
        _copy_rest(base, folder, saved_dtype, manifest)
        result = ParityReport(
            out=str(out),
            base=info.fingerprint.model,
            adapter_digest=version_digest(adapter),
            layers=len(updates),
            dtype=saved_dtype,
            parity=parity,
            notes=tuple(_notes(manifest)),
        )
        if parity == "weights":
            result = replace(result, weights=check_weights(merged, folder, report))
        else:
            questions = questions_for(base, info, manifest.goldens if manifest else (), prompts=prompts)
            with scratch_beside(folder) as scratch:
                found = measure_parity(
                    base,
                    adapter,
                    folder,
                    merged.changed(),
                    questions,
                    saved_dtype,
                    scratch,
                    report,
                    served[1] if served else None,
                )
            result = judged(result, questions, found, tolerance or Tolerance(), served[0] if served else "")
        _write_card(folder, info, manifest, result)
        stem = (manifest.name if manifest else info.name)[:40].rstrip("._-")
        name = f"{stem}-merged-{result.adapter_digest[:8]}"
        spec = BaseSpec(name=name, model=name, licence=combined_licence(info, manifest), folder=out.absolute())
        write_base(folder, describe_base(folder, spec, report))
    return result


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it when the block ends well, and is gone when it does not.

    What a killed process left there is removed first; a living one is not disturbed: MergeError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.building")
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise MergeError(f"Another process is writing {out}. Wait for it, or give another folder.") from exc
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
            if out.exists():
                out.rmdir()
            folder.rename(out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder inside the one that is being built, for what must not be in the end."""
    scratch = folder / ".scratch"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def judged(
    result: ParityReport, questions: Questions, found: Mapping[str, Figures], tolerance: Tolerance, address: str
) -> ParityReport:
    """The report with its rungs. Raises ParityError with the figures when one of them is outside its limits."""
    unmerged, effect = found["unmerged"]["all"], found["effect"]["all"]

    def rung(name: str, dtype: str, figures: Figures, limits: Limits, by: str = "transformers", note: str = "") -> Rung:
        goldens, sample = figures.get("goldens"), figures.get("sample")
        return Rung(name=name, dtype=dtype, by=by, goldens=goldens, sample=sample, limits=limits, note=note)

    alone = (
        f"The base alone is {effect.mean_abs:.2g} nats away on average, with {effect.top1:.1%} of the first choices."
    )
    rungs = [
        rung("adapter", result.dtype, found["unmerged"], Limits(stop_drop=None), "PEFT", alone),
        rung("merged", "float32", found["fp32"], tolerance.merged()),
        rung("saved", result.dtype, found["saved"], tolerance.saved(unmerged)),
    ]
    if "served" in found:
        note = "Compared as far as the texts are equal; its KL is a lower bound, from the likeliest tokens."
        rungs.insert(1, rung("served", "as served", found["served"], tolerance.served(unmerged), address, note))
    for each in rungs:
        judge_rung(each)
    return replace(
        result,
        prompts=questions.source,
        tokens=unmerged.tokens,
        fp32=found["fp32"]["all"],
        saved=found["saved"]["all"],
        unmerged=unmerged,
        effect=effect,
        rungs=tuple(rungs),
    )


def check_weights(merged: "MergedWeights", folder: Path, report: Report = silent) -> WeightCheck:
    """Read every saved tensor back. Raises ParityError for one that is not what it has to be."""
    changed = kept = 0
    largest = 0.0
    saved = open_checkpoint(folder)
    for done, (name, file) in enumerate(sorted(saved.items())):
        report("comparing weights", done, len(saved))
        if name not in merged.updates:
            kept += 1
            if not merged.kept(name, file):
                raise ParityError(f"{name} is not the base's own after it was saved, and the merge was not kept.")
            continue
        changed += 1
        tensor = file.read(name)
        exact = merged.exact(name)
        place = np.maximum(np.abs(exact), np.finfo(np.float32).tiny) * float(ml_dtypes.finfo(tensor.dtype).eps)
        cancelled = 2e-6 * float(np.abs(exact).max())  # float32's own error where base and update nearly cancel out
        error = (np.abs(tensor.astype(np.float64) - exact) - cancelled) / place
        if not (error <= 1).all():
            raise ParityError(
                f"{name} is not base + adapter: off by {error.max():.3g} last places. The merge was not kept."
            )
        largest = max(largest, float(error.max()))
    return WeightCheck(changed, kept, round(largest, 3))


def combined_licence(info: BaseModelInfo, manifest: Manifest | None) -> str:
    """The terms of base, data and teachers, as one expression: the merged model is a base that others may build on."""
    stated = [info.licence]
    if manifest is not None:
        for data in manifest.data:
            stated += [data.licence, *data.exceptions.values(), *([data.teacher.licence] if data.teacher else [])]
    terms: list[str] = []
    for text in dict.fromkeys(stated):
        reading = read_licence(text)  # by its ids, for a remark in the middle would hide what follows it
        terms += [" OR ".join(licence.id for licence in choices) for choices in reading.all_of]
        terms += ["unknown"] * bool(reading.unknown)
    return " AND ".join(dict.fromkeys(terms))


@dataclass(frozen=True)
class MergedWeights:
    """The base's tensors with the adapter folded in, each computed when it is asked for."""

    base: Mapping[str, TensorFile]
    adapter: TensorFile
    config: LoraConfig
    updates: Mapping[str, _Update]  # by name of the base's tensor

    def read(self, name: str, dtype: str) -> NDArray[Any]:
        """One tensor, merged in float32 where the adapter touches it, then cast."""
        update = self.updates.get(name)
        if update is None:
            tensor = self.base[name].read(name)
            return tensor if tensor.dtype.kind in "iub" else tensor.astype(DTYPES[dtype], copy=False)
        with np.errstate(over="ignore"):
            cast = self._merged(name, update, np.float32).astype(DTYPES[dtype])
        if not np.isfinite(cast.astype(np.float32)).all():
            raise MergeError(f"{name} is not finite in {dtype} after the merge. Save in bfloat16 or float32.")
        return cast

    def changed(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every tensor the adapter touches, in float32."""
        for name, update in self.updates.items():
            yield name, self._merged(name, update, np.float32)

    def kept(self, name: str, saved: TensorFile) -> bool:
        """Whether a tensor the adapter does not touch was saved as it is, bit for bit; as bytes, a piece at a time."""
        own, other = self.base[name], saved.tensors[name].dtype
        if own.tensors[name].dtype == other:
            return all(a == b for a, b in zip(own.chunks(name), saved.chunks(name), strict=True))
        return bool(np.array_equal(self.read(name, other).view(np.uint8), saved.read(name).view(np.uint8)))

    def exact(self, name: str) -> NDArray[Any]:
        """A tensor the adapter touches, in float64."""
        return self._merged(name, self.updates[name], np.float64)

    def _merged(self, name: str, update: _Update, dtype: Any) -> NDArray[Any]:
        start = self.base[name].read(name)
        if "whole" in update.names:  # modules_to_save, biases, embeddings that PEFT saved along
            start = self.adapter.read(update.names["whole"])
        if "A" not in update.names:
            return start.astype(dtype)
        a, b = (self.adapter.read(update.names[side]).astype(dtype) for side in ("A", "B"))
        b *= dtype(self.config.scale_of(name.removesuffix(".weight")))  # in place, and smaller than the product
        merged: NDArray[Any] = b @ a
        merged += start  # widens as it adds
        if "magnitude" in update.names:  # DoRA (Liu et al. 2024, equation 5): each row scaled to a trained length
            magnitude = self.adapter.read(update.names["magnitude"]).astype(dtype)
            merged *= (magnitude.reshape(-1) / np.linalg.norm(merged, axis=1))[:, None]
        return merged


def check_adapter(adapter: Path, base: Path, info: BaseModelInfo) -> Manifest | None:
    """The adapter's manifest. Raises MergeError unless validation finds nothing that also keeps it from being merged."""
    if json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        raise MergeError(
            f"{info.name} is quantized. Merge into its unquantized checkpoint, then quantize the result: lorikeet quantize"
        )
    try:
        return validate_adapter(adapter, info, NO_LIMITS).manifest
    except InvalidAdapterError as exc:
        serious = [fault for fault in exc.faults if fault.code not in MERGEABLE]
        embeddings = [fault for fault in exc.faults if fault.code == "embeddings" and "lora" in fault.message]
        if embeddings:
            raise MergeError(f"The adapter cannot be merged into {info.name}: {_LORA_ON_EMBEDDINGS}") from exc
        if serious:
            raise MergeError(
                f"The adapter cannot be merged into {info.name}: " + " ".join(fault.message for fault in serious)
            ) from exc
    return read_manifest(adapter)


_LORA_ON_EMBEDDINGS = (
    "it carries LoRA on the embeddings or on an output head that is tied to them. One matrix then does two jobs and the "
    "adapter was trained for one of them; PEFT saves a wrong model there without an error. Train on linear layers only."
)


def _notes(manifest: Manifest | None) -> Iterator[str]:
    """What a reader of the report has to know."""
    if manifest is None:
        yield "The adapter came without a manifest: its base was compared by shapes only."
        return
    if manifest.training.get("tuning") == "qlora":
        yield (
            "The adapter was trained over the base in NF4 and is merged into the base in full precision, as it is served. "
            "Quantize the merged model, not the base before it; evaluate the merged model, for it is not the one training saw."
        )
    if manifest.serving.chat_template is not None:
        yield "The chat template is the adapter's own, not the base's."


def plan_updates(
    weights: TensorFile, base: Mapping[str, TensorFile], *, tied_vocabulary: int | None = None
) -> dict[str, _Update]:
    """Which tensor of the base each tensor of the adapter changes. Raises MergeError for one that changes none.

    tied_vocabulary: rows of the embedding, where the output head is the same matrix.
    """
    updates: dict[str, _Update] = {}
    strange: list[str] = []
    for name, info in weights.tensors.items():
        parsed = parse_tensor_name(name)
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if parsed is not None:
            target, role = f"{parsed.module}.weight", str(parsed.side)
        elif ".lora_magnitude_vector" in name:
            target, role = plain.split(".lora_magnitude_vector")[0] + ".weight", "magnitude"
        else:
            target, role = plain, "whole"
        if target not in base or (role == "whole" and base[target].tensors[target].shape != info.shape):
            strange.append(name)
        elif tied_vocabulary is not None and base[target].tensors[target].shape[:1] == (tied_vocabulary,):
            raise MergeError(
                f"{name} changes the embeddings, which are the output head as well (tied embeddings): merging it would change "
                "both, and PEFT trained one. Train on linear layers only, or on a base whose head is a matrix of its own."
            )
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


def _copy_rest(base: Path, folder: Path, dtype: str, manifest: Manifest | None) -> None:
    """Tokenizer, template (the adapter's own where it was trained with one), generation and model configuration."""
    left_out = {REPORT_FILE, CARD_FILE, "lorikeet-base.json"}
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in left_out:
            shutil.copyfile(path, folder / path.name)
    if manifest is not None and manifest.serving.chat_template is not None:
        (folder / "chat_template.jinja").write_text(manifest.serving.chat_template, encoding="utf-8")
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
    """Card and report: where it came from, under which terms, and how equal it is."""
    licences = [f"- base {info.fingerprint.model}: {info.licence}"]
    verdict: Verdict | None = None
    if manifest is not None:
        verdict = manifest.judge_licences(PROMOTION, base_licence=info.licence)
        licences += [f"- data {data.name} ({data.rows} rows): {data.licence}" for data in manifest.data]
        licences += [f"- teacher {data.teacher.name}: {data.teacher.licence}" for data in manifest.data if data.teacher]
        licences += ["", f"Together: {verdict.level}.", "", *(f"- {line}" for line in verdict.lines())]
    else:
        licences.append("- training data: not known, the adapter came without a manifest")
    weights = []
    if result.weights is not None:
        weights = [
            "",
            f"Compared by weights: {result.weights.changed} changed tensors within {result.weights.largest_error:g} last "
            f"places of their exact value, {result.weights.kept} equal to the base's bit for bit. No log-probabilities were "
            "compared.",
        ]
    revision = f" at revision {info.fingerprint.revision}" if info.fingerprint.revision else ""
    text = "\n".join(
        [
            f"# {manifest.name if manifest else 'Adapter'} merged into {info.name}",
            "",
            f"Base model {info.fingerprint.model}{revision}, weights `{info.fingerprint.weights_digest}`.",
            f"Adapter content `{result.adapter_digest}`, {result.layers} layers changed, made with `lorikeet merge`, saved in "
            f"{result.dtype}.",
            *(f"{note}" for note in result.notes),
            *weights,
            "",
            "## Licences",
            "",
            *licences,
            "",
        ]
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    write_report(
        folder,
        {
            **result.as_dict(),
            "base_weights_digest": info.fingerprint.weights_digest,
            "base_licence": info.licence,
            "licences": verdict.model_dump(mode="json") if verdict else None,
            "manifest": manifest.model_dump(mode="json", exclude={"goldens"}) if manifest else None,
        },
    )
