"""`lorikeet train`: an adapter from a configuration."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, SetOption, err, out, print_json

train_app = typer.Typer(add_completion=False, context_settings=HELP)


@train_app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or a shipped name such as reuters-topics.")],
    overrides: SetOption = None,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Where the adapter goes. Default: LORIKEET_HOME/runs/NAME-TIME/adapter."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the newest run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter: PEFT folder and manifest, ready for `lorikeet push`.

    Missing data is fetched and a missing base model prepared first. Loss is on the answers alone.
    """
    from trainer.config import load_train_config
    from trainer.run import last_run_folder, new_run_folder, run_training

    settings, path = load_train_config(config, overrides or ())
    place = home().create()
    if out_folder is not None:
        out_folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the training, not after
    run = last_run_folder(place, settings.name) if resume else new_run_folder(place, settings.name, time.time())
    with training_bar() as listen:
        finished = run_training(
            settings, place, run, relative_to=path.parent, adapter=out_folder, resume=resume, listen=listen
        )
    metrics = finished.manifest.metrics
    if as_json:
        print_json(
            {
                "name": settings.name,
                "adapter": str(finished.adapter),
                "run": str(finished.run),
                "seconds": finished.seconds,
                "metrics": metrics,
            }
        )
        return
    out.print(
        f"Trained '{settings.name}' in {finished.seconds:.0f} s: eval loss {metrics['eval_loss']:.4f}.", soft_wrap=True
    )
    out.print(f"Adapter: {finished.adapter}", soft_wrap=True, highlight=False)
    out.print(f"Upload:  lorikeet push {finished.adapter} --name {settings.name}", soft_wrap=True, highlight=False)


@contextmanager
def training_bar() -> Iterator[Callable[[str, Any], None]]:
    """Step, loss, speed and time left, on stderr."""
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
            text = (
                f"training  loss {trained.loss:.3f}  eval {trained.eval_loss:.3f}  {trained.tokens_per_s:.0f} tokens/s"
            )
            progress.update(task, description=text, completed=trained.step, total=trained.steps)

        yield listen
