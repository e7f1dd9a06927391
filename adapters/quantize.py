"""Quantize a merged checkpoint with llm-compressor, in an environment of its own, to a format vLLM loads.

After the merge, never before: what is quantized is the 16-bit checkpoint. The result is a prepared base model like its
source, held against it on the adapter's goldens and on sample prompts before it gets its name; outside the scheme's limits
nothing is kept, unless a reason to accept that is given.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import (
    BaseModelInfo,
    BaseSpec,
    ModuleInfo,
    Report,
    describe_base,
    open_checkpoint,
    read_base,
    silent,
    write_base,
)
from adapters.calibration import MAX_TOKENS, load_tokenizer
from adapters.compressed import Scheme, quantized_modules, round_activations, write_dequantized
from adapters.environments import Environment, Step, Tool, tqdm_step
from adapters.errors import ParityError, QuantizeError
from adapters.ladder import Limits, Rung, add_rung, read_report, read_rungs, write_report
from adapters.manifest import Golden
from adapters.parity import Questions, Reference, answer, check_memory, load_model, questions_for, quietly
from adapters.task import Task

LLM_COMPRESSOR = Tool("llmcompressor")
GROUPS = (128, 64, 32)  # inputs that share a scale, as the engine's kernels know them
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class QuantizationScheme:
    """What `--scheme` names."""

    name: str
    preset: str  # llm-compressor's name
    what: str
    grouped: bool  # a scale for each group of inputs; else one a row
    calibrated: bool  # useless without rows to calibrate on
    limits: Limits


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QuantizationScheme(
            "w8a8", "W8A8", "weights and activations in 8-bit integers", False, False, Limits(kl=0.1, top1=0.85)
        ),
        QuantizationScheme(
            "fp8", "FP8_DYNAMIC", "weights and activations in 8-bit floats", False, False, Limits(kl=0.1, top1=0.85)
        ),
        QuantizationScheme(
            "int8-weight-only",
            "W8A16",
            "weights in 8-bit integers (no kernel in vLLM on CPUs)",
            True,
            False,
            Limits(kl=0.02, top1=0.95),
        ),
        QuantizationScheme("w4a16", "W4A16", "weights in 4-bit integers", True, True, Limits(kl=0.2, top1=0.8)),
    )
}


@dataclass(frozen=True)
class Quantized:
    """What was made. Sizes are those of the weights' files; group_size 0: one scale a row."""

    out: str
    scheme: str
    method: str
    group_size: int
    rows: int
    source_bytes: int
    size_bytes: int
    took_s: float
    rung: Rung

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "rung": self.rung.model_dump(mode="json")}


def quantize_checkpoint(
    folder: Path,
    out: Path,
    scheme: QuantizationScheme,
    environment: Environment,
    *,
    rows: Sequence[Sequence[int]] = (),
    goldens: Sequence[Golden] = (),
    prompts: Path | None = None,
    task: Task | None = None,
    accept: str = "",
    report: Report = silent,
) -> Quantized:
    """Write the quantized checkpoint to `out`, with the rung it adds to the parity ladder.

    rows: token ids to calibrate on (GPTQ); none: round to nearest. prompts: see `questions_for`. task: scored before and after.
    Raises QuantizeError for what cannot be quantized, ToolError when llm-compressor fails, ParityError outside the limits;
    all leave no `out` behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizeError(f"{out} exists already. Give a folder that does not.")
    info = read_unquantized(folder)
    if scheme.calibrated and not rows:
        raise QuantizeError(
            f"{scheme.name} rounded to nearest ruins a model. Give rows of its training data: --data FOLDER."
        )
    check_memory(open_checkpoint(folder))
    group = choose_group(info) if scheme.grouped else 0
    method = f"GPTQ on {len(rows)} rows" if rows else "round to nearest"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        started = time.monotonic()
        _run_llm_compressor(folder, made, scheme, environment, group, rows, Path(temporary), report)
        took_s = time.monotonic() - started
        _copy_rest(folder, made)
        questions = questions_for(folder, info, goldens, prompts=prompts)
        rung = measure_rung(folder, made, scheme, questions, Path(temporary), report, task)
        rung = rung.model_copy(update={"note": _note(scheme, method, group), "accepted": accept})
        try:
            add_rung(made, rung)
        except ParityError as exc:
            better = "" if rows else "Calibrated on training data it may be nearer: --data FOLDER. "
            raise ParityError(f'{exc} {better}To keep it all the same: --accept "reason".') from exc
        write_base(made, _describe(made, out, info, scheme, report))
        result = Quantized(
            out=str(out),
            scheme=scheme.name,
            method=method,
            group_size=group,
            rows=len(rows),
            source_bytes=weights_bytes(folder),
            size_bytes=weights_bytes(made),
            took_s=round(took_s, 1),
            rung=rung,
        )
        if out.exists():
            out.rmdir()
        made.rename(out)
    return result


def read_unquantized(folder: Path) -> BaseModelInfo:
    """The checkpoint's description. Raises QuantizeError when it is quantized already, BaseModelError when not prepared."""
    info = read_base(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise QuantizeError(f"{folder} is quantized already. Start from the merged checkpoint in 16 bits.")
    return info


def choose_group(info: BaseModelInfo) -> int:
    """The largest number of inputs that every layer's inputs divide by; 0, one scale a row, where none does."""
    inputs = {module.in_features for name, module in info.modules.items() if name != "lm_head"}
    return next((size for size in GROUPS if all(count % size == 0 for count in inputs)), 0)


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure_rung(
    checkpoint: Path,
    quantized: Path,
    scheme: QuantizationScheme,
    questions: Questions,
    scratch: Path,
    report: Report,
    task: Task | None = None,
) -> Rung:
    """The quantized checkpoint's arithmetic in float32, held against the unquantized one's; one model in memory at a time.

    Weights are put back from their integers; activations are rounded where the scheme rounds them.
    """
    import torch

    def texts(model: Any) -> list[str]:
        return answer(model, task.prompts, questions, load_tokenizer(checkpoint)) if task else []

    with quietly():
        report("parity: not quantized", 0, 2)
        model = load_model(checkpoint, torch.float32)
        reference, before = Reference(model, questions, scratch), texts(model)
        del model
        report("parity: quantized", 1, 2)
        model = _load_quantized(quantized, scratch / "dequantized")
        figures, after = reference.hold(model), texts(model)
        report("parity", 2, 2)
    return Rung(
        name=f"quantized {scheme.name}",
        dtype=scheme.name,
        by="transformers, with the quantized weights and activations in float32",
        against="the checkpoint before it was quantized, in float32",
        goldens=figures.get("goldens"),
        sample=figures.get("sample"),
        task=task and task.compare(before, after),
        limits=scheme.limits,
    )


def _load_quantized(folder: Path, scratch: Path) -> Any:
    import torch

    scheme: Scheme = write_dequantized(folder, scratch)
    generation = folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, scratch / generation.name)
    model = load_model(scratch, torch.float32)
    shutil.rmtree(scratch)
    if scheme.activations is not None:
        round_activations(model, quantized_modules(open_checkpoint(folder)), scheme.activations)
    return model


def _run_llm_compressor(
    folder: Path,
    made: Path,
    scheme: QuantizationScheme,
    environment: Environment,
    group: int,
    rows: Sequence[Sequence[int]],
    scratch: Path,
    report: Report,
) -> None:
    calibration = scratch / "rows.jsonl"
    if rows:
        calibration.write_text("".join(json.dumps(list(ids)) + "\n" for ids in rows), encoding="utf-8")
    asked = {
        "model": str(folder.resolve()),
        "out": str(made.resolve()),
        "scheme": scheme.preset,
        "group_size": group if scheme.grouped else None,
        "rows": str(calibration.resolve()) if rows else None,
        "max_tokens": min(MAX_TOKENS, max((len(ids) for ids in rows), default=1)),
    }
    environment.run("quantize.py", [json.dumps(asked)], report, step_of=_layer)
    if not weights_bytes(made):
        raise QuantizeError(f"llm-compressor left no weights of {folder}.")


def _layer(line: str) -> Step | None:
    """llm-compressor counts layers before its bar: "(3/31): Calibrating:  50%|"."""
    step = tqdm_step(line)
    if step is not None and step[0].startswith("("):
        place, _, what = step[0].partition("): ")
        done, _, total = place[1:].partition("/")
        if done.isdigit() and total.isdigit():
            return f"layer by layer: {what.lower()}", int(done) - 1, int(total)
    return step


def _copy_rest(folder: Path, made: Path) -> None:
    """Tokenizer, template, generation configuration, card, manifest and report; weights and config are new.

    Rungs of other things that were made from the checkpoint stay with it.
    """
    new = {"config.json", "lorikeet-base.json", "model.safetensors.index.json", RECIPE_FILE}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in new:
            shutil.copyfile(path, made / path.name)
    if report := read_report(made):
        own = [rung for rung in read_rungs(made) if not rung.name.startswith(("quantized", "gguf"))]
        write_report(made, {**report, "rungs": [rung.model_dump(mode="json") for rung in own]})


def _describe(made: Path, out: Path, info: BaseModelInfo, scheme: QuantizationScheme, report: Report) -> BaseModelInfo:
    """As any prepared base; its layers are its source's, with no norm where the weight is quantized."""
    spec = BaseSpec(
        name=f"{info.name[:40]}-{scheme.name}",
        model=info.fingerprint.model,
        licence=info.licence,
        revision=info.fingerprint.revision,
        folder=out.absolute(),
    )
    described = describe_base(made, spec, report)
    modules = {
        name: described.modules[name]
        if name in described.modules and described.modules[name].norm
        else ModuleInfo(out_features=module.out_features, in_features=module.in_features, norm=0.0)
        for name, module in info.modules.items()
    }
    return described.model_copy(update={"modules": modules})


def _note(scheme: QuantizationScheme, method: str, group: int) -> str:
    shared = f", a scale for each {group} inputs" if group else ", a scale for each row"
    return f"{method}{shared}; {scheme.what}; the output layer is kept."
