"""One training run from configuration to what is served: plan, stages, export, verdict."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.home import Home
from adapters.manifest import Manifest
from adapters.peft_format import WEIGHTS_FILE
from adapters.tensors import open_tensors
from trainer.config import Profile, TrainConfig
from trainer.errors import TrainingError
from trainer.methods.progress import Progress
from trainer.methods.record import METRICS_FILE, MetricsFile, read_metrics
from trainer.methods.stage import Stage, Trained, train_stage
from trainer.plan import Plan, plan_run, write_json, write_plan
from trainer.servability import check_trained

CONFIG_FILE = "config.json"
RECEIPT_FILE = "mask-receipt.json"
FINISHED_FILE = "finished.json"

Listener = Callable[[str, Progress | None], None]  # what is happening, and how far the training itself is
Announce = Callable[[str], None]  # a line that stays: verdicts, the estimate


@dataclass(frozen=True)
class Finished:
    """What a run leaves behind. adapter: its folder, or that of the whole model, which has no manifest."""

    run: Path
    adapter: Path
    manifest: Manifest | None
    metrics: dict[str, float]
    profile: Profile
    seconds: float


def wait_patiently() -> None:
    """Let torch's threads sleep while they wait for each other; too late once torch is loaded.

    By default they spin, and beside any other busy process each then waits for one that is not running: on two cores with a
    load of 5 a step took 10 s instead of 1.3.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quiet_libraries() -> None:
    """What libraries say of optional parts of theirs, on import, is nothing that a reader could act upon."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def new_run_folder(home: Home, name: str, now_s: float) -> Path:
    return home.runs / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now_s))}"


def last_run_folder(home: Home, name: str) -> Path:
    """Raises TrainingError when there is none to resume."""
    found = sorted(home.runs.glob(f"{name}-????????-??????"))
    if not found:
        raise TrainingError(f"There is no run of '{name}' under {home.runs} to resume.")
    return found[-1]


def run_training(
    config: TrainConfig,
    home: Home,
    run: Path,
    *,
    relative_to: Path,
    adapter: Path | None = None,
    resume: bool = False,
    listen: Listener = lambda step, progress: None,
    announce: Announce = lambda line: None,
) -> Finished:
    """Everything from nothing to a folder that `lorikeet push` takes. Raises TrainerError, BaseModelError.

    adapter: where the finished folder goes; none: run/adapter, or run/model for a whole one. resume: go on from the newest
    checkpoint, from the beginning where there is none yet.
    """
    started = time.monotonic()
    wait_patiently()
    quiet_libraries()
    remember(config, run, resume=resume)
    plan = plan_run(config, home, run, relative_to=relative_to, tell=lambda step: listen(step, None))
    for line in plan.lines:
        announce(line)
    write_plan(plan, run)
    receipts = [stage.receipt for stage in plan.stages if stage.receipt is not None]
    if receipts:
        write_json(run / RECEIPT_FILE, asdict(receipts[-1]))
    trained = learn(config, plan, run, resume=resume, listen=listen)
    MetricsFile(run, len(plan.stages)).plot()
    metrics = trained.metrics | {
        "seconds": round(sum(stage_seconds(run).values()), 1),
        "train_rows": float(sum(len(stage.train) for stage in plan.stages)),
        "left_out_rows": float(sum(stage.left_out for stage in plan.stages)),
    }
    finished = _export(config, plan, run, adapter, trained, metrics, started, listen)
    write_json(
        run / FINISHED_FILE,
        {
            "adapter": str(finished.adapter),
            "profile": finished.profile,
            "metrics": finished.metrics,
            "seconds": finished.seconds,
        },
    )
    return finished


def join_training(config: TrainConfig, home: Home, run: Path, *, relative_to: Path, resume: bool = False) -> None:
    """The part of a process that only helps another one train: no files, no export."""
    wait_patiently()
    quiet_libraries()
    plan = plan_run(config, home, run, relative_to=relative_to)
    learn(config, plan, run, resume=resume, listen=lambda step, progress: None)


def learn(config: TrainConfig, plan: Plan, run: Path, *, resume: bool, listen: Listener) -> Trained:
    """All stages, each going on from the best checkpoint of the one before. Raises TrainingError."""
    from trainer.methods.dpo import dpo_trainer
    from trainer.methods.sft import sft_trainer

    builders = {"sft": sft_trainer, "pretrain": sft_trainer, "dpo": dpo_trainer}
    start = plan.adapter
    trained: Trained | None = None
    for number, (stage, examples) in enumerate(zip(config.courses, plan.stages, strict=True), start=1):
        several = f" {number}/{len(plan.stages)} ({stage.method})" if len(plan.stages) > 1 else ""
        listen(f"loading the base model{several}", None)
        trained = train_stage(
            Stage(
                number=number,
                config=stage,
                whole=config,
                base=plan.base,
                start=start,
                renderer=plan.renderer,
                train=examples.train,
                eval=examples.eval,
                folder=run / f"stage-{number}" if several else run,
                run=run,
            ),
            builders[stage.method],
            steps_before=sum(plan.steps[: number - 1]),
            steps_of_all=sum(plan.steps),
            resume=resume,
            report=lambda progress, several=several: listen(f"training{several}", progress),  # type: ignore[misc]
        )
        start = trained.best
    assert trained is not None  # noqa: S101 - a configuration has at least one stage
    return trained


def _export(
    config: TrainConfig,
    plan: Plan,
    run: Path,
    adapter: Path | None,
    trained: Trained,
    metrics: dict[str, float],
    started: float,
    listen: Listener,
) -> Finished:
    from trainer.export import export_adapter, export_model

    profile = plan.servability.profile
    if config.tuning == "full":
        listen("writing the model", None)
        folder = adapter or run / "model"
        metrics |= {"trainable_parameters": float(plan.estimate.trainable)} if plan.estimate else {}
        export_model(trained.best, config, plan, folder, metrics)
        return Finished(run, folder, None, metrics, profile, round(time.monotonic() - started, 1))
    listen("writing the adapter", None)
    folder = adapter or run / "adapter"
    weights = open_tensors(trained.best / WEIGHTS_FILE)
    metrics["trainable_parameters"] = float(sum(math.prod(info.shape) for info in weights.tensors.values()))
    manifest = export_adapter(
        trained.best,
        config,
        plan,
        folder,
        metrics=metrics,
        report=lambda done, total: listen(f"goldens {done}/{total}", None),
    )
    check_trained(folder, plan.info, plan.engine, profile)
    return Finished(run, folder, manifest, manifest.metrics, profile, round(time.monotonic() - started, 1))


def stage_seconds(run: Path) -> dict[int, float]:
    """stage -> seconds it was trained for, over all processes that took part one after another."""
    return {each.stage: each.seconds for each in read_metrics(run / METRICS_FILE)}


def remember(config: TrainConfig, run: Path, *, resume: bool) -> None:
    """Write the configuration into the run, or check that a resumed one is still the same. Raises TrainingError."""
    path, current = run / CONFIG_FILE, config.model_dump(mode="json")
    if resume:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise TrainingError(f"{run} is no run that can be resumed: {exc}") from exc
        changed = sorted(key for key in before.keys() | current.keys() if before.get(key) != current.get(key))
        if changed:
            raise TrainingError(f"The configuration of {run} has changed ({', '.join(changed)}); start a new run.")
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json(path, current)
