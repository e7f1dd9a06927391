"""`lorikeet train`: an adapter, or a whole model, from a configuration."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, SetOption, err, out, print_json

if TYPE_CHECKING:
    from trainer.run import Finished

train_app = typer.Typer(add_completion=False, context_settings=HELP)


@train_app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or a shipped name such as reuters-topics.")],
    overrides: SetOption = None,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Where the result goes. Default: LORIKEET_HOME/runs/NAME-TIME/adapter, or /model."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of this name, from its last checkpoint.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that train together. Default: one for each visible GPU.")
    ] = None,
    run_folder: Annotated[Path | None, typer.Option("--into", hidden=True)] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter: PEFT folder and manifest, ready for `lorikeet push`. With tuning: full, a model of its own.

    The configuration is checked whole, the verdict on serving and the estimate are told before any weight is loaded.
    Missing data is fetched and a missing base model prepared first. Loss is on the answers alone; on raw text with
    method: pretrain; on preferred answers over rejected ones with method: dpo.
    """
    from trainer.config import load_train_config
    from trainer.launch import is_launched, is_main_process
    from trainer.run import join_training, last_run_folder, new_run_folder, run_training

    settings, path = load_train_config(config, overrides or ())
    place = home().create()
    if out_folder is not None:
        out_folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the training, not after
    if is_launched() and run_folder is not None and not is_main_process():
        join_training(settings, place, run_folder, relative_to=path.parent, resume=resume)
        return
    run = run_folder or (
        last_run_folder(place, settings.name) if resume else new_run_folder(place, settings.name, time.time())
    )
    if not is_launched() and (count := _processes(processes)) > 1:
        told = _launched(config, overrides or (), run, out_folder, count, resume=resume)
    else:
        with training_bar() as (listen, announce):
            finished = run_training(
                settings,
                place,
                run,
                relative_to=path.parent,
                adapter=out_folder,
                resume=resume,
                listen=listen,
                announce=announce,
            )
        if is_launched():
            return  # the process that launched us tells
        told = _told(finished)
    if as_json:
        print_json({"name": settings.name, **told})
        return
    print_result(settings.name, told)


def _processes(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    from trainer.launch import visible_gpus
    from trainer.run import wait_patiently

    wait_patiently()
    return max(1, visible_gpus())


def _launched(
    config: str, overrides: list[str] | tuple[str, ...], run: Path, out_folder: Path | None, count: int, *, resume: bool
) -> dict[str, Any]:
    """Train in several processes; what their first one wrote down at its end. Raises TrainingError."""
    import json

    from trainer.launch import free_port, launch, launch_command, own_arguments, visible_gpus
    from trainer.run import FINISHED_FILE

    (run / FINISHED_FILE).unlink(missing_ok=True)
    arguments = own_arguments(config, overrides, run, out_folder, resume=resume)
    launch(launch_command(arguments, count, gpus=visible_gpus(), port=free_port()))
    return {"run": str(run), **json.loads((run / FINISHED_FILE).read_text(encoding="utf-8"))}


def _told(finished: "Finished") -> dict[str, Any]:
    return {
        "adapter": str(finished.adapter),
        "run": str(finished.run),
        "profile": finished.profile,
        "seconds": finished.seconds,
        "metrics": finished.metrics,
    }


def print_result(name: str, told: dict[str, Any]) -> None:
    metrics = told["metrics"]
    served = f" On the base that serves it: {metrics['eval_loss_served']:.4f}." if "eval_loss_served" in metrics else ""
    out.print(
        f"Trained '{name}' in {told['seconds']:.0f} s: eval loss {metrics['eval_loss']:.4f}.{served}", soft_wrap=True
    )
    whole = (Path(told["adapter"]) / "config.json").is_file()
    out.print(f"{'Model' if whole else 'Adapter'}: {told['adapter']}", soft_wrap=True, highlight=False)
    out.print(f"Metrics: {told['run']}/metrics.jsonl, loss.svg", soft_wrap=True, highlight=False)
    if whole:
        out.print(f"Serve:   LORIKEET_BASE={told['adapter']} lorikeet up", soft_wrap=True, highlight=False)
    elif told["profile"] == "merge-only":
        out.print(f"Merge:   lorikeet merge {told['adapter']} --out FOLDER", soft_wrap=True, highlight=False)
    else:
        out.print(f"Upload:  lorikeet push {told['adapter']} --name {name}", soft_wrap=True, highlight=False)


@contextmanager
def training_bar() -> Iterator[tuple[Callable[[str, Any], None], Callable[[str], None]]]:
    """(listen, announce): step, loss, speed and time left on stderr; lines above that stay."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("starting", total=None)

        def listen(step: str, trained: Any) -> None:
            if trained is None:
                progress.update(task, description=step)
                return
            text = f"{step}  loss {trained.loss:.3f}  eval {trained.eval_loss:.3f}  {trained.tokens_per_s:.0f} tokens/s"
            progress.update(task, description=text, completed=trained.step, total=trained.steps)

        def announce(line: str) -> None:
            progress.console.print(line, soft_wrap=True, highlight=False, markup=False)

        yield listen, announce
