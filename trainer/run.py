"""One training run from configuration to adapter folder: base, data, receipt, method, export."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.base import BaseModelInfo, load_spec, prepare_base, read_base
from adapters.home import Home
from adapters.manifest import Manifest
from trainer.config import TrainConfig
from trainer.data.catalog import load_dataset_spec
from trainer.data.chat import with_system_prompt
from trainer.data.fetch import fetch_dataset
from trainer.data.training import golden_rows, load_training_data
from trainer.errors import TrainingError
from trainer.methods.progress import Progress
from trainer.methods.sft import train_sft
from trainer.template import ChatRenderer, Rendered, load_renderer, mask_receipt

CONFIG_FILE = "config.json"
RECEIPT_FILE = "mask-receipt.json"

Listener = Callable[[str, Progress | None], None]  # what is happening, and how far the training itself is


@dataclass(frozen=True)
class Finished:
    """What a run leaves behind."""

    run: Path
    adapter: Path
    manifest: Manifest
    seconds: float


def resolve_base(name: str, home: Home, tell: Callable[[str], None] = lambda step: None) -> tuple[Path, BaseModelInfo]:
    """A prepared model folder as it is; a specification prepared first where needed. Raises BaseModelError."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        folder = prepare_base(load_spec(name), home.models, lambda step, done, total: tell(f"preparing base: {step}"))
    return folder, read_base(folder)


def wait_patiently() -> None:
    """Let torch's threads sleep while they wait for each other; too late once torch is loaded.

    By default they spin, and beside any other busy process each then waits for one that is not running: on two cores with a
    load of 5 a step took 10 s instead of 1.3.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
) -> Finished:
    """Everything from nothing to a folder that `lorikeet push` takes. Raises TrainerError, BaseModelError.

    adapter: where the finished folder goes; none: run/adapter.
    """
    started = time.monotonic()
    wait_patiently()

    def tell(step: str) -> None:
        listen(step, None)

    remember(config, run, resume=resume)
    base, info = resolve_base(config.base, home, tell)
    tell("reading data")
    data = load_training_data(
        config,
        relative_to=relative_to,
        fetch=lambda name: fetch_dataset(
            load_dataset_spec(name), home.datasets, report=lambda step, size: tell(f"data set {name}: {step}")
        ),
    )
    renderer = load_renderer(base, config.serving.chat_template)
    rows, held_out = (
        [with_system_prompt(row, config.serving.system_prompt) for row in part] for part in (data.train, data.eval)
    )
    train = render_rows(renderer, rows, max_tokens=config.max_tokens)
    evaluation = render_rows(renderer, held_out, max_tokens=config.max_tokens)
    write_json(run / RECEIPT_FILE, asdict(mask_receipt(renderer, train)))
    tell("loading the base model")
    trained = train_sft(
        config, base, renderer, train, evaluation, run, resume=resume, report=lambda p: listen("training", p)
    )
    tell("writing the adapter")
    folder = adapter or run / "adapter"
    from trainer.export import export_adapter

    manifest = export_adapter(
        trained.model,
        config,
        info,
        renderer,
        folder,
        goldens=golden_rows(held_out, config.goldens),
        lineage=data.lineage,
        metrics=trained.metrics | {"train_rows": len(train), "left_out_rows": len(data.train) - len(train)},
        report=lambda done, total: tell(f"goldens {done}/{total}"),
    )
    return Finished(run, folder, manifest, round(time.monotonic() - started, 1))


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


def render_rows(renderer: ChatRenderer, rows: list[list[dict[str, str]]], *, max_tokens: int) -> list[Rendered]:
    """In tokens, without those that are too long. Raises TemplateError, TrainingError when none is left."""
    rendered = [row for row in map(renderer.render, rows) if len(row.input_ids) <= max_tokens]
    if not rendered:
        raise TrainingError(f"Every row is longer than max_tokens={max_tokens}. Raise it, or shorten the rows.")
    return rendered


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
