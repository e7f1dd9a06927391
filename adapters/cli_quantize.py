"""`lorikeet quantize` and `lorikeet export gguf`: thin layers over their modules."""

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.base import find_base
from adapters.calibration import held_out_file, read_calibration
from adapters.cli import Json, print_json, progress
from adapters.environments import make_environment
from adapters.errors import QuantizeError
from adapters.gguf_export import GGUF_TOOLS, TYPES, export_gguf
from adapters.home import home
from adapters.ladder import Rung, rung_rows
from adapters.manifest import Golden, read_manifest
from adapters.parity import GREEDY_TOKENS
from adapters.quantize import LLM_COMPRESSOR, SCHEMES, quantize_checkpoint, read_unquantized
from adapters.stored import stored_adapter
from adapters.task import find_task

quantize_app = typer.Typer(add_completion=False)
export_app = typer.Typer(no_args_is_help=True, add_completion=False)

CALIBRATION_ROWS = 128

CheckpointArgument = Annotated[
    str, typer.Argument(help="Folder that `lorikeet merge` wrote, or a prepared base: its name or folder.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Whose golden prompts to compare on: the adapter that was merged, a folder or support@2. Default: those in "
        "the checkpoint's folder, if it has any.",
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(help="JSON lines with prompts to compare on besides the goldens.", exists=True, dir_okay=False),
]
TaskOption = Annotated[
    Path | None,
    typer.Option(
        "--task",
        help="Chats that end with a short right answer, as a data set's folder or a JSON lines file: how many are answered so "
        "before and after.",
        exists=True,
    ),
]
AcceptOption = Annotated[
    str, typer.Option("--accept", help="Keep a result outside its limits, for this reason; it goes into the report.")
]


@quantize_app.command()
def quantize(
    checkpoint: CheckpointArgument,
    scheme: Annotated[str, typer.Option(help="; ".join(f"{one.name}: {one.what}" for one in SCHEMES.values()) + ".")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result; must not exist yet. Default: DIR-SCHEME beside it.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Rows to calibrate on: a data set's folder or a JSON lines file of what the model was trained on. Without "
            "it weights are rounded to nearest.",
            exists=True,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of them, drawn at random.")] = CALIBRATION_ROWS,
    adapter: AdapterOption = None,
    prompts: PromptsOption = None,
    task: TaskOption = None,
    accept: AcceptOption = "",
    as_json: Json = False,
) -> None:
    """Quantize a merged model for vLLM, and prove how much of it is left.

    Weights become 8- or 4-bit numbers in the compressed-tensors format; the output layer is kept. The result is compared with
    the unquantized checkpoint on golden and sample prompts: log-probabilities, first choices, KL, and how many greedy answers
    end by themselves. Where the answers of --task, or of the held-out rows beside --data, are short, how many are right before
    and after. Outside the scheme's limits the command fails and leaves nothing, unless --accept says why not. Serve the
    result with LORIKEET_BASE=DIR. The first call installs llm-compressor (1.5 GB) under LORIKEET_HOME/tools.
    """
    if scheme not in SCHEMES:
        raise QuantizeError(f"'{scheme}' is no scheme. Use one of {', '.join(SCHEMES)}.")
    folder = _checkpoint(checkpoint)
    info = read_unquantized(folder)
    with _ended_in_order(), progress() as report:
        goldens = _goldens(folder, adapter)
        calibration: list[list[int]] = []
        if data is not None:
            report("reading rows to calibrate on", 0, 0)
            calibration = read_calibration(data, folder, rows=rows, context_tokens=info.context_tokens)
        scored = find_task(task, data, folder, context_tokens=info.context_tokens, answer_tokens=GREEDY_TOKENS)
        environment = make_environment(LLM_COMPRESSOR, home().tools, report)
        result = quantize_checkpoint(
            folder,
            out or folder.with_name(f"{folder.name}-{scheme}"),
            SCHEMES[scheme],
            environment,
            rows=calibration,
            goldens=goldens,
            prompts=prompts or held_out_file(data),
            task=scored,
            accept=accept,
            report=report,
        )
    if as_json:
        print_json(result.as_dict())
        return
    _show(
        result.rung,
        f"{scheme} ({result.method}, {result.took_s:.0f} s)",
        result.source_bytes,
        result.size_bytes,
        result.out,
    )


@export_app.callback()
def _formats() -> None:
    """Write a model in another program's format."""  # a group, although it has one command today


@export_app.command("gguf")
def gguf(
    checkpoint: CheckpointArgument,
    kind: Annotated[str, typer.Option("--type", help=f"One of {', '.join(TYPES)}.")] = "q8_0",
    out: Annotated[
        Path | None, typer.Option(help="File to write; must not exist yet. Default: DIR-TYPE.gguf beside the folder.")
    ] = None,
    adapter: AdapterOption = None,
    prompts: PromptsOption = None,
    task: TaskOption = None,
    accept: AcceptOption = "",
    as_json: Json = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp, and prove that it answers as before.

    The file's weights are compared with the checkpoint's on golden and sample prompts, and llama.cpp itself is asked whether
    its answers are the same and end by themselves. Outside the type's limits the command fails and leaves no file, unless
    --accept says why not; the rung goes into the checkpoint's parity report. The first call installs converter and llama.cpp
    (1.3 GB) under LORIKEET_HOME/tools.
    """
    if kind not in TYPES:
        raise QuantizeError(f"'{kind}' is no type. Use one of {', '.join(TYPES)}.")
    folder = _checkpoint(checkpoint)
    info = read_unquantized(folder)
    with _ended_in_order(), progress() as report:
        goldens = _goldens(folder, adapter)
        scored = find_task(task, None, folder, context_tokens=info.context_tokens, answer_tokens=GREEDY_TOKENS)
        environment = make_environment(GGUF_TOOLS, home().tools, report)
        result = export_gguf(
            folder,
            out or folder.with_name(f"{folder.name}-{kind}.gguf"),
            TYPES[kind],
            environment,
            goldens=goldens,
            prompts=prompts or held_out_file(task),
            task=scored,
            accept=accept,
            report=report,
        )
    if as_json:
        print_json(result.as_dict())
        return
    _show(result.rung, f"{kind} ({result.took_s:.0f} s)", result.source_bytes, result.size_bytes, result.out)


def _checkpoint(name: str) -> Path:
    """Absolute, with its own name: results lie beside it."""
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() else find_base(name, home().models)


def _goldens(folder: Path, adapter: str | None) -> Sequence[Golden]:
    if adapter is None:
        manifest = read_manifest(folder)
    elif Path(adapter).is_dir():
        manifest = read_manifest(Path(adapter))
    else:
        with tempfile.TemporaryDirectory(prefix="lorikeet-goldens-") as temporary:
            manifest = read_manifest(stored_adapter(adapter, Path(temporary) / "adapter"))
    if adapter is not None and (manifest is None or not manifest.goldens):
        raise QuantizeError(f"{adapter} has no golden prompts.")
    return manifest.goldens if manifest is not None else ()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that nothing half-made is left."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(rung: Rung, title: str, source_bytes: int, size_bytes: int, out: str) -> None:
    table = Table(title=f"{title}: against {rung.against}")
    for column in ("on", "largest", "mean", "same first choice", "KL", "stopped", "same text"):
        table.add_column(column, justify="left" if column == "on" else "right")
    for _, *cells in rung_rows(rung):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    if rung.task:
        console.print(str(rung.task), soft_wrap=True)
    if rung.faults:
        console.print(f"[yellow]accepted:[/yellow] {escape('; '.join(rung.faults))}", soft_wrap=True)
    sizes = f"{size_bytes / 1e6:.0f} MB, {size_bytes / source_bytes:.0%} of the {source_bytes / 1e6:.0f} MB before"
    console.print(f"[green]Written[/green] {escape(out)}: {sizes}", soft_wrap=True)
