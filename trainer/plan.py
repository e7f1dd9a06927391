"""A run before it begins: everything that can be wrong found, everything that can be told told, and no weight loaded."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.base import BaseModelInfo, load_spec, prepare_base, read_base
from adapters.home import Home
from adapters.licences import TRAINING, LicencePolicy, Verdict, judge_licences
from adapters.manifest import DataLineage, licence_sources
from trainer.config import CONFIGS, LoraConfig, TrainConfig
from trainer.data.catalog import load_dataset_spec
from trainer.data.fetch import fetch_dataset
from trainer.errors import ConfigError, TrainingError
from trainer.estimate import GIB, Estimate, GpuList, Machine, RowFacts, estimate_run, load_gpus
from trainer.examples import Examples, load_examples, sequences_of
from trainer.launch import processes
from trainer.methods.model import lora_of
from trainer.methods.stage import count_steps, needs, pack
from trainer.servability import Servability, ServingEngine, as_document, check_start, judge_plan, load_engine
from trainer.shape import read_shape
from trainer.template import ChatRenderer, load_renderer

PLAN_FILE = "plan.json"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a run will do. stages: examples of each, packed where it packs."""

    base: Path
    info: BaseModelInfo
    renderer: ChatRenderer
    adapter: Path | None
    lora: LoraConfig
    engine: ServingEngine
    servability: Servability
    licences: Verdict
    stages: tuple[Examples, ...]
    steps: tuple[int, ...]
    estimate: Estimate | None
    lines: tuple[str, ...]  # what to tell before training

    @property
    def lineage(self) -> tuple[DataLineage, ...]:
        """Each source once, in the order of the stages."""
        return tuple({(each.name, each.digest): each for stage in self.stages for each in stage.lineage}.values())


def resolve_base(name: str, home: Home, tell: Tell = lambda step: None) -> tuple[Path, BaseModelInfo]:
    """A prepared model folder as it is; a specification prepared first where needed. Raises BaseModelError."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        folder = prepare_base(load_spec(name), home.models, lambda step, done, total: tell(f"preparing base: {step}"))
    return folder, read_base(folder)


def plan_run(config: TrainConfig, home: Home, run: Path, *, relative_to: Path, tell: Tell = lambda step: None) -> Plan:
    """Raises TrainerError, BaseModelError, InvalidAdapterError for what would fail later, or could not be served."""
    needs(config)
    engine = load_engine(config.engine)
    base, info = resolve_base(config.base, home, tell)
    adapter = None if config.adapter is None else relative_to / config.adapter.expanduser()
    lora = config.lora
    if adapter is not None:
        check_start(adapter, info)
        lora = lora_of(adapter, config.lora)
    servability = judge_plan(config.model_copy(update={"lora": lora}), lora, info, engine)
    tell("reading data")
    renderer = load_renderer(base, config.serving.chat_template)
    stages = tuple(
        load_examples(
            stage,
            config,
            renderer,
            relative_to=relative_to,
            fetch=lambda name: fetch_dataset(
                load_dataset_spec(name), home.datasets, report=lambda step, size: tell(f"data set {name}: {step}")
            ),
        )
        for stage in config.courses
    )
    licences = _licences(config, info, stages)
    foreseen, unforeseen = _estimate(config, lora, base, stages)
    stages = tuple(
        replace(examples, train=pack(examples.train, stage.max_tokens), eval=pack(examples.eval, stage.max_tokens))
        if stage.packs
        else examples
        for stage, examples in zip(config.courses, stages, strict=True)
    )
    steps = tuple(
        count_steps(stage, len(examples.train), processes())
        for stage, examples in zip(config.courses, stages, strict=True)
    )
    if foreseen is not None:
        _check_disk(run, foreseen)
    lines = [servability.line]
    if adapter is not None:
        lines.append(
            f"Goes on from {adapter}: rank {lora.r}, alpha {lora.alpha:g}; the configuration's own `lora` is not used."
        )
    lines += [f"Licences: {finding.source}: {finding.what}" for finding in licences.findings if finding.level != "ok"]
    gpus = load_gpus(CONFIGS / "gpus.yaml")
    lines.append(estimate_line(foreseen, sum(steps), gpus) if foreseen else f"No estimate: {unforeseen}")
    return Plan(
        base, info, renderer, adapter, lora, engine, servability, licences, stages, steps, foreseen, tuple(lines)
    )


def _licences(config: TrainConfig, info: BaseModelInfo, stages: Sequence[Examples]) -> Verdict:
    lineage = [each for stage in stages for each in stage.lineage]
    policy: LicencePolicy = TRAINING.model_copy(update={"excepted": config.licence_exceptions})
    verdict = judge_licences(licence_sources(info.fingerprint.model, info.licence, lineage), policy, name=config.name)
    if verdict.level == "block":
        told = "\n".join(f"{finding.source} ({finding.licence}): {finding.what}" for finding in verdict.blocking)
        raise TrainingError(
            f"Licences forbid this training:\n{told}\nWith permission, name the source under `licence_exceptions`."
        )
    return verdict


def _estimate(
    config: TrainConfig, lora: LoraConfig, base: Path, stages: Sequence[Examples]
) -> tuple[Estimate | None, str]:
    """(the stage that needs most memory, with tokens and work of all; or why there is none)."""
    import torch

    facts = []
    for examples in stages:
        lengths = [length for example in examples.train for length in sequences_of(example)]
        facts.append(
            RowFacts(
                rows=len(examples.train),
                tokens_per_row=max(1, round(sum(lengths) / len(lengths))),
                longest_row=max(lengths),
                trained_share=examples.trained_tokens / sum(lengths),
            )
        )
    try:
        shape = read_shape(json.loads((base / "config.json").read_text(encoding="utf-8")))
        machine: Machine = "gpu" if torch.cuda.is_available() else "cpu"
        return estimate_run(config, shape, facts, lora=lora, machine=machine), ""
    except ConfigError as exc:
        return None, str(exc)


def estimate_line(found: Estimate, steps: int, gpus: GpuList) -> str:
    """The result of `lorikeet estimate` in a sentence: for the machine at hand, and for the smallest GPU."""
    gpu = found.smallest_gpu(gpus)
    if found.machine == "cpu":
        place = f"{_duration(found.cpu_seconds(os.cpu_count() or 1))} on this CPU"
    elif gpu is None:
        place = "no single GPU that is listed holds it"
    else:
        place = f"{_duration(found.seconds_on(gpu))} on {gpu.name}, the smallest that holds it"
    return (
        f"Estimate: {found.trainable:,} of {found.parameters:,} parameters trained; {found.tokens:,} tokens in {steps} "
        f"steps; about {found.peak_bytes / GIB:.1f} GiB of memory, {place}; {_needed(found) / 2**20:,.0f} MiB of disk."
    )


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _needed(found: Estimate) -> int:
    """Bytes a run writes: the base is on the disk already."""
    return sum(size_bytes for part, size_bytes in found.disk_bytes.items() if part != "base model")


def _check_disk(run: Path, found: Estimate) -> None:
    place = next(folder for folder in (run, *run.parents) if folder.exists())
    free, needed = shutil.disk_usage(place).free, _needed(found)
    if free < needed:
        raise TrainingError(
            f"The run needs about {needed / GIB:.1f} GiB below {place}, where {free / GIB:.1f} GiB are free. Make room, "
            "or set LORIKEET_HOME elsewhere."
        )


def write_plan(plan: Plan, run: Path) -> None:
    """plan.json and, for chat rows, the mask receipt."""
    document: dict[str, Any] = {
        "base": str(plan.base),
        "adapter": str(plan.adapter) if plan.adapter else None,
        "lora": plan.lora.model_dump(mode="json"),
        "servability": as_document(plan.servability),
        "licences": plan.licences.model_dump(mode="json"),
        "lineage": [each.model_dump(mode="json") for each in plan.lineage],
        "steps": list(plan.steps),
        "rows": [{"train": len(each.train), "eval": len(each.eval), "left_out": each.left_out} for each in plan.stages],
        "estimate": (asdict(plan.estimate) | {"peak_bytes": plan.estimate.peak_bytes}) if plan.estimate else None,
    }
    write_json(run / PLAN_FILE, document)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
