"""The training of one fine-tuning job, in a process of its own: `python -m trainer.job FOLDER`.

The worker leaves job.json, training_file.jsonl, maybe validation_file.jsonl and further/ in the folder; this leaves
journal.jsonl, callable checkpoints in checkpoint-<step>/ and at last the adapter in adapter/. Started again on the same folder
it goes on from the last checkpoint. It ends with its worker: both ends of its standard input are theirs.
"""

import fcntl
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from adapters.errors import AdapterError, InvalidFileError
from adapters.home import Home
from adapters.training_files import check_training_file, read_lines, trainer_row
from trainer.config import TrainConfig
from trainer.errors import DataError, TrainerError
from trainer.journal import Entry, Journal
from trainer.methods.progress import Progress
from trainer.recipe import RECIPES, load_recipe, run_config, settle

logger = logging.getLogger(__name__)

JOB_FILE, CONFIG_FILE, LOCK_FILE = "job.json", "run.json", "lock"
SENT = {"training_file": "train.jsonl", "validation_file": "eval.jsonl"}  # the API's parameter -> the trainer's file
ADAPTER, FURTHER, RUN = "adapter", "further", "run"
DONE, FAILED, STOPPED = 0, 1, 75  # exit codes; STOPPED: asked to, and the rest is still to be done
NICE = 10  # beside an engine on the same processors, answers come first
LOCK_S = 60.0  # a predecessor whose worker was killed ends as soon as it notices


class JobSpec(BaseModel):
    """job.json: the job as the worker hands it on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    adapter: str  # name of what is trained
    base: str  # as a configuration of `lorikeet train` names it
    base_slug: str
    home: Path
    method: str
    hyperparameters: dict[str, Any]
    seed: int
    engine: str = "auto"
    recipes: Path = RECIPES


class StopAskedError(Exception):
    """The worker wants this training to go on later."""


def main(folder: Path) -> int:
    """Train, and say how it ended."""
    os.nice(NICE)
    spec = JobSpec.model_validate_json((folder / JOB_FILE).read_bytes())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=end_with_the_worker, daemon=True).start()
    with alone(folder):
        journal = Journal(folder)
        try:
            train(spec, folder, journal, stop)
        except StopAskedError:
            return STOPPED
        except Exception as exc:
            logger.exception("training failed")
            tell(journal, "failed", "failed", failure(exc, folder))
            return FAILED
    return DONE


def end_with_the_worker() -> None:
    """A worker that is killed closes its end: nobody would read what is trained, and the next worker trains it too."""
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: its lock would abort this process at its own end
        pass
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder. Raises TimeoutError."""
    with (folder / LOCK_FILE).open("a") as file:
        ends_s = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > ends_s:
                    raise TimeoutError(f"{folder} is still being trained by another process.") from exc
                time.sleep(0.1)
        yield


def train(spec: JobSpec, folder: Path, journal: Journal, stop: threading.Event) -> None:
    """Everything up to the adapter in its place. Raises TrainerError, AdapterError, StopAskedError."""
    tell(journal, "phase:validating", "phase", {"phase": "validating"})
    config = prepare(spec, folder, journal)
    from trainer.methods.checkpoints import last_checkpoint
    from trainer.run import run_training

    run, adapter = folder / RUN, folder / ADAPTER
    newest = max(
        (found for place in run.glob("**/checkpoints") if (found := last_checkpoint(place)) is not None),
        key=step_of,
        default=None,
    )
    if newest is None:
        shutil.rmtree(run, ignore_errors=True)  # without a checkpoint nothing in it is worth going on from
    else:
        keep_checkpoint(newest, folder, journal)
    listener = Listener(folder, journal, stop, step=step_of(newest) if newest is not None else 0)
    tell(journal, "phase:training", "phase", {"phase": "training"})
    partial = folder / f"{ADAPTER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    finished = run_training(
        config,
        Home(spec.home),
        run,
        relative_to=folder,
        adapter=partial,
        resume=newest is not None,
        listen=listener.listen,
    )
    partial.rename(adapter)
    metrics = {name: value for name, value in finished.metrics.items() if math.isfinite(value)}
    tell(journal, "finished", "finished", {"metrics": metrics, "trained_tokens": trained_tokens(run, config)})


def prepare(spec: JobSpec, folder: Path, journal: Journal) -> TrainConfig:
    """The files in the trainer's form, and the run's configuration: the same each time, so that it may be resumed.

    Raises WrongFileError, ConfigError.
    """
    kept = folder / CONFIG_FILE
    rows = {param: convert(folder, param) for param in SENT if (folder / f"{param}.jsonl").is_file()}
    recipe = load_recipe(spec.base_slug, spec.recipes)
    chosen = settle(spec.hyperparameters, recipe, method=spec.method, rows=rows["training_file"])
    tell(journal, "settled", "settled", {"hyperparameters": chosen.as_dict(), "rows": rows["training_file"]})
    if kept.is_file():
        return TrainConfig.model_validate_json(kept.read_bytes())
    config = run_config(
        spec.model_dump(),
        recipe,
        chosen,
        base=spec.base,
        eval_file="validation_file" in rows,
        further=(folder / FURTHER).is_dir(),
    )
    write_whole(kept, config.model_dump_json())
    return config


def convert(folder: Path, param: str) -> int:
    """Write the trainer's file of an uploaded one; how many rows it has. Raises WrongFileError."""
    sent = folder / f"{param}.jsonl"
    try:
        facts = check_training_file(sent)
    except InvalidFileError as exc:
        raise WrongFileError(param, exc.line, str(exc)) from exc
    lines = (
        orjson.dumps(trainer_row(row, facts.form), option=orjson.OPT_APPEND_NEWLINE) for _, row in read_lines(sent)
    )
    partial = folder / f"{SENT[param]}.partial"
    with partial.open("wb") as file:
        file.writelines(lines)
    partial.replace(folder / SENT[param])
    return facts.rows


class WrongFileError(TrainerError):
    """An uploaded file that cannot be trained on. line: counted from 1; 0 for the file as a whole."""

    def __init__(self, param: str, line: int, message: str) -> None:
        self.param = param
        self.line = line
        super().__init__(message)


class Listener:
    """Turns what a run reports into journal entries, and stops it where that was asked for and nothing is lost by it."""

    def __init__(self, folder: Path, journal: Journal, stop: threading.Event, *, step: int) -> None:
        """step: the last one that is known already."""
        self._folder = folder
        self._journal = journal
        self._stop = stop
        self._step = step
        self._eval_loss = math.nan
        self._began = False

    def listen(self, what: str, progress: Progress | None) -> None:
        """Raises StopAskedError."""
        if progress is None:
            if self._stop.is_set() and not self._began:
                raise StopAskedError
            return
        self._began = True
        step, facts = progress.step, {"step": progress.step, "total_steps": progress.steps}
        if step > self._step and math.isfinite(progress.loss):
            self._step = step
            measured = {"train_loss": progress.loss, "train_mean_token_accuracy": progress.token_accuracy}
            tell(self._journal, f"step:{step}", "step", facts | finite(measured))
        if math.isfinite(progress.eval_loss) and progress.eval_loss != self._eval_loss:
            self._eval_loss = progress.eval_loss
            tell(self._journal, f"evaluated:{step}", "evaluated", facts | {"valid_loss": progress.eval_loss})
        if progress.checkpoint is not None:
            keep_checkpoint(progress.checkpoint, self._folder, self._journal)
            if self._stop.is_set():
                raise StopAskedError


def keep_checkpoint(checkpoint: Path, folder: Path, journal: Journal) -> None:
    """Put an adapter that can be served beside the run, which removes older checkpoints; tell it when it is there."""
    from trainer.export import export_checkpoint

    step = step_of(checkpoint)
    final = folder / f"checkpoint-{step}"
    if not final.is_dir():
        partial = folder / f"checkpoint-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        export_checkpoint(folder / RUN, checkpoint, partial)
        partial.rename(final)
    tell(journal, f"checkpoint:{step}", "checkpoint", {"step": step})


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def trained_tokens(run: Path, config: TrainConfig) -> int | None:
    """Tokens of the training rows, as often as they were seen."""
    receipt = run / "mask-receipt.json"
    if not receipt.is_file():
        return None
    return round(int(json.loads(receipt.read_text(encoding="utf-8"))["tokens"]) * config.optimizer.epochs)


def failure(exc: Exception, folder: Path) -> dict[str, Any]:
    """For the owner of the job: what to mend, without a path of ours."""
    if isinstance(exc, DataError):
        param = next((param for param, name in SENT.items() if exc.path.name == name), "training_file")
        faults = [(sent_line(folder, param, fault.line), fault.message) for fault in exc.faults[:5]]
        shown = "; ".join(f"Line {line}: {message}" if line else message for line, message in faults)
        more = f" (and {len(exc.faults) - len(faults)} more)" if len(exc.faults) > len(faults) else ""
        return {"code": f"invalid_{param}", "message": shown + more, "param": param, "line": faults[0][0] or None}
    if isinstance(exc, WrongFileError):
        return {"code": f"invalid_{exc.param}", "message": str(exc), "param": exc.param, "line": exc.line or None}
    if isinstance(exc, TrainerError | AdapterError):
        said = str(exc).replace(f"{folder}/", "").replace(str(folder), "the job")
        return {"code": "training_failed", "message": said, "param": None, "line": None}
    message = "The server had an error while training. Its operator finds why in the job's log."
    return {"code": "server_error", "message": message, "param": None, "line": None}


def sent_line(folder: Path, param: str, line: int) -> int:
    """The line of the uploaded file, which may hold blank ones, behind a line of the trainer's."""
    if not line:
        return 0
    number, _ = next(islice(read_lines(folder / f"{param}.jsonl"), line - 1, None), (0, None))
    return number


def finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def tell(journal: Journal, key: str, kind: str, data: dict[str, Any]) -> None:
    journal.write(Entry(key, kind, time.time(), data))


def write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(main(Path(sys.argv[1])))
