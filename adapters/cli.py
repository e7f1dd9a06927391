"""`lorikeet base` and `lorikeet inspect`: thin layers over their modules; and what all commands of this room share."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapters.archive import UploadLimits, unpack
from adapters.base import (
    DEFAULT_BASE,
    BaseModelInfo,
    Report,
    find_base,
    load_spec,
    modules_named,
    prepare_base,
    read_base,
)
from adapters.errors import Fault, InvalidAdapterError
from adapters.home import home
from adapters.validation import AdapterReport, EngineLimits, validate_adapter

base_app = typer.Typer(help="Prepare and inspect base models.", no_args_is_help=True, add_completion=False)
inspect_app = typer.Typer(add_completion=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
BaseOption = Annotated[
    str,
    typer.Option(
        "--base", envvar="LORIKEET_BASE", help="Prepared base: a name from configs/bases, a YAML file, or a folder."
    ),
]
BaseArgument = Annotated[
    str,
    typer.Argument(
        envvar="LORIKEET_BASE",
        help="A name from configs/bases, a YAML file, a checkpoint's folder, or a hub id (owner/model).",
    ),
]


@base_app.command("prepare")
def prepare(config: BaseArgument = DEFAULT_BASE, as_json: Json = False) -> None:
    """Fetch or unpack a base model once, and write down its fingerprint. Again: returns at once."""
    with progress() as report:
        folder = prepare_base(load_spec(config), home().create().models, report)
    _show_base(folder, read_base(folder), as_json)


@base_app.command("show")
def show(config: BaseArgument = DEFAULT_BASE, as_json: Json = False) -> None:
    """What a prepared base is: fingerprint, licence, layers that LoRA can sit on."""
    folder = find_base(config, home().models)
    _show_base(folder, read_base(folder), as_json)


@inspect_app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Adapter folder, or a zip, tar or tar.gz of one.", exists=True)],
    base: BaseOption = DEFAULT_BASE,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank the engine was started for.")] = 16,
    as_json: Json = False,
) -> None:
    """Show an adapter, and every fault that keeps it from being served. Exit code 1 when there is one."""
    info = read_base(find_base(base, home().models))
    report: AdapterReport | None = None
    faults: tuple[Fault, ...] = ()
    with tempfile.TemporaryDirectory(prefix="lorikeet-inspect-") as temporary:
        folder = path
        try:
            if path.is_file():
                folder = Path(temporary) / "adapter"
                unpack(path, folder, UploadLimits())
            report = validate_adapter(folder, info, EngineLimits(max_rank))
        except InvalidAdapterError as exc:
            faults = exc.faults
    if as_json:
        print_json(_inspection(path, report, faults))
    else:
        console = Console()
        if report is not None:
            console.print(_adapter_table(path, info, report))
            for warning in report.warnings:
                console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
        else:
            console.print(_fault_table(path, faults))
    if faults:
        raise typer.Exit(1)


def _show_base(folder: Path, info: BaseModelInfo, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder), **info.model_dump(mode="json")})
        return
    table = _facts(info.name)
    rows = {
        "folder": str(folder),
        "source": info.source,
        "licence": info.licence,
        "weights": info.fingerprint.weights_digest,
        "template": info.fingerprint.template_digest,
        "context": f"{info.context_tokens} tokens",
        "vocabulary": f"{info.vocab_size} tokens" + (", tied to the output" if info.tied_embeddings else ""),
        "layers for LoRA": ", ".join(f"{name} x {count}" for name, count in sorted(modules_named(info).items())),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console().print(table)


def _inspection(path: Path, report: AdapterReport | None, faults: tuple[Fault, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(path), "valid": report is not None}
    if report is not None:
        found |= {
            "digest": report.digest,
            "rank": report.rank,
            "alpha": report.alpha,
            "target_modules": list(report.target_modules),
            "size_bytes": report.size_bytes,
            "norm_ratio": report.norm_ratio,
            "manifest": report.manifest.model_dump(mode="json", exclude={"goldens"}) if report.manifest else None,
            "goldens": len(report.manifest.goldens) if report.manifest else 0,
            "warnings": list(report.warnings),
        }
    return {**found, "faults": [fault.as_dict() for fault in faults]}


def _adapter_table(path: Path, info: BaseModelInfo, report: AdapterReport) -> Table:
    table = _facts(f"{path.name}: can be served on {info.name}")
    manifest = report.manifest
    rows = {
        "digest": report.digest,
        "rank, alpha": f"{report.rank}, {report.alpha:g}",
        "layers": ", ".join(report.target_modules),
        "size": f"{report.size_bytes / 1e6:.1f} MB",
        "largest update": f"{report.norm_ratio:.3g} of its base weight's norm",
    }
    if manifest is not None:
        rows |= {
            "name": manifest.name,
            "goldens": str(len(manifest.goldens)),
            "data": ", ".join(f"{data.name} ({data.rows} rows, {data.licence})" for data in manifest.data)
            or "none named",
            "licences": "; ".join((verdict := manifest.judge_licences(base_licence=info.licence)).lines())
            or verdict.level,
        }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _facts(title: str) -> Table:
    table = Table(show_header=False, title=title)
    table.add_column()
    table.add_column(overflow="fold")  # a digest is worth nothing when it is cut
    return table


def _fault_table(path: Path, faults: tuple[Fault, ...]) -> Table:
    table = Table(title=f"{path.name}: cannot be served, {len(faults)} faults", show_lines=True)
    for column in ("fault", "where", "what is wrong", "how to mend it"):
        table.add_column(column, overflow="fold")
    for fault in faults:
        table.add_row(fault.code, escape(fault.where), escape(fault.message), escape(fault.fix))
    return table


@contextmanager
def progress() -> Iterator[Report]:
    """One line on standard error that follows the current step."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(step: str, done: int, total: int) -> None:
            bar.update(task, description=escape(step), completed=done, total=total or None)

        yield report


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
