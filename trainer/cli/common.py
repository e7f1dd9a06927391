"""What the trainer's commands share: options, how a document is printed, data sets and keys of this machine."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from adapters.home import home
from trainer.errors import ConfigError

HELP = {"help_option_names": ["-h", "--help"]}
DEFAULT_PORT = 8080

out = Console()
err = Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as optimizer.epochs=2. Repeatable."),
]


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """A line on stderr telling the current step; nothing of it stays."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=err, transient=True) as progress:
        task = progress.add_task("")
        yield lambda step: progress.update(task, description=step)


def fetch_known(name: str, tell: Callable[[str], None], *, force: bool = False) -> Path:
    from trainer.data.catalog import load_dataset_spec
    from trainer.data.fetch import fetch_dataset

    def report(step: str, size_bytes: int) -> None:
        tell(f"{name}: {step}" + (f" {size_bytes / 1e6:.1f} MB" if size_bytes else ""))

    return fetch_dataset(load_dataset_spec(name), home().datasets, force=force, report=report)


def operator_key(url: str) -> str:
    """The key the gateway wrote for commands on this machine. Raises ConfigError."""
    key = home().operator_key_for(url)
    if key is None:
        raise ConfigError(
            "No API key. Set LORIKEET_API_KEY or give --key; on the gateway's machine `lorikeet up` writes one."
        )
    return key
