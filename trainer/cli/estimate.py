"""`lorikeet estimate`: what a run will take."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, SetOption, out, print_json
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.estimate import Estimate, GpuList

estimate_app = typer.Typer(add_completion=False, context_settings=HELP)


@estimate_app.command("estimate")
def estimate_command(
    config: Annotated[str, typer.Argument(help="Training configuration, or a shipped name such as reuters-topics.")],
    overrides: SetOption = None,
    model_config: Annotated[
        Path | None, typer.Option(help="A config.json. Default: that of the base model.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that `lorikeet data build` wrote, for rows and tokens.", show_default=False),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows. Default: counted.")] = None,
    tokens_per_row: Annotated[int | None, typer.Option(min=1, help="On average. Default: counted.")] = None,
    gpus: Annotated[
        Path | None, typer.Option(help="List of GPUs and prices. Default: configs/gpus.yaml.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Parameters, memory by part, disk, tokens, time and cost of a run, for full, LoRA and QLoRA training; reads no weights.

    Parameters are exact. Memory was compared with real runs (docs/benchmarks.md); time is a usual share of the peak speed.
    """
    from trainer.config import load_train_config
    from trainer.estimate import estimate_run, load_gpus
    from trainer.rowfacts import stage_facts
    from trainer.shape import read_shape

    settings, path = load_train_config(config, overrides or ())
    if data is not None:
        if settings.stages:
            raise ConfigError("With `stages`, each names its own data; --data goes with a configuration of one stage.")
        settings = settings.model_copy(update={"data": _in_folder(settings.data, data), "answer": None})
    shape = read_shape(read_model_json(model_config, settings.base))
    facts, sources = [], []
    for stage in settings.courses:
        known, source = stage_facts(stage, relative_to=path.parent, datasets=home().datasets)
        if rows is not None:
            known = replace(known, rows=rows)
        if tokens_per_row is not None:  # how long the longest then is, nobody says: as long as it may be
            known = replace(known, tokens_per_row=tokens_per_row, longest_row=max(tokens_per_row, stage.max_tokens))
        facts.append(known)
        sources.append(source)
    listed = load_gpus(gpus) if gpus else load_gpus()
    found = [estimate_run(settings, shape, facts, tuning=tuning) for tuning in ("lora", "qlora", "full")]
    here = [estimate_run(settings, shape, facts, tuning=tuning, machine="cpu") for tuning in ("lora", "qlora", "full")]
    cores = os.cpu_count() or 1
    if as_json:
        print_json(
            {
                "config": settings.name,
                "tuning": settings.tuning,
                "rows": [asdict(each) | {"source": source} for each, source in zip(facts, sources, strict=True)],
                "priced_on": listed.priced_on,
                "currency": listed.currency,
                "methods": [_document(gpu, cpu, listed, cores) for gpu, cpu in zip(found, here, strict=True)],
            }
        )
        return
    out.print(estimate_table(found, here, listed, cores))
    for each, source in zip(facts, sources, strict=True):
        longest = f", the longest {each.longest_row}" if each.longest_row else ""
        out.print(
            f"[dim]{each.rows:,} rows of about {each.tokens_per_row} tokens{longest} ({escape(source)}); the "
            f"configuration says tuning: {settings.tuning}. Prices of {listed.priced_on}, examples: edit configs/gpus.yaml. "
            "Memory is for GPUs unless it says CPU; formulas: trainer/estimate.py.[/dim]"
        )


def _in_folder(data: Any, folder: Path) -> Any:
    from trainer.config import DataConfig

    limits = {"train_rows": data.train_rows, "eval_rows": data.eval_rows} if data is not None else {}
    return DataConfig(folder=folder.absolute(), **limits)


def estimate_table(found: "list[Estimate]", here: "list[Estimate]", listed: "GpuList", cores: int) -> Table:
    """A column for each way of training: found on a GPU, here on this CPU."""
    table = Table("", *(each.tuning for each in found), box=None, header_style="bold", pad_edge=False)
    table.add_row("trained parameters", *(f"{each.trainable:,}" for each in found))
    table.add_row("of", *(f"{each.parameters:,}" for each in found))
    table.add_row("tokens", *(f"{each.tokens:,}" for each in found))
    for part in found[0].memory_bytes:
        if any(each.memory_bytes[part] for each in found):
            table.add_row(f"memory: {part}", *(_size(each.memory_bytes[part]) for each in found))
    table.add_row("[bold]memory, peak[/bold]", *(f"[bold]{_size(each.peak_bytes)}[/bold]" for each in found))
    table.add_row("memory, peak on a CPU", *(_size(each.peak_bytes) for each in here))
    for part in found[0].disk_bytes:
        table.add_row(f"disk: {part}", *(_size(each.disk_bytes[part]) for each in found))
    smallest = [each.smallest_gpu(listed) for each in found]
    table.add_row("[bold]smallest GPU[/bold]", *(f"[bold]{gpu.name if gpu else 'several'}[/bold]" for gpu in smallest))
    for gpu in listed.gpus:
        cells = [
            f"{_duration(each.seconds_on(gpu))}, {each.cost_on(gpu):.2f} {listed.currency}" if each.fits(gpu) else "–"
            for each in found
        ]
        table.add_row(f"on {gpu.name}", *cells)
    table.add_row(f"time on {cores} CPU cores", *(_duration(each.cpu_seconds(cores)) for each in found))
    return table


def _document(gpu: "Estimate", cpu: "Estimate", listed: "GpuList", cores: int) -> dict[str, Any]:
    smallest = gpu.smallest_gpu(listed)
    return {
        "method": gpu.tuning,
        "parameters": gpu.parameters,
        "trainable": gpu.trainable,
        "tokens": gpu.tokens,
        "flops": gpu.flops,
        "memory_bytes": gpu.memory_bytes,
        "peak_bytes": gpu.peak_bytes,
        "disk_bytes": gpu.disk_bytes,
        "smallest_gpu": smallest.name if smallest else None,
        "gpus": [
            {
                "name": one.name,
                "fits": gpu.fits(one),
                "seconds": round(gpu.seconds_on(one), 1),
                "cost": round(gpu.cost_on(one), 4),
            }
            for one in listed.gpus
        ],
        "cpu": {
            "memory_bytes": cpu.memory_bytes,
            "peak_bytes": cpu.peak_bytes,
            "cores": cores,
            "seconds": round(cpu.cpu_seconds(cores), 1),
        },
    }


def read_model_json(path: Path | None, base: str) -> Mapping[str, Any]:
    """The model's config.json: as given, of the prepared base, or as shipped for it. Raises ConfigError, BaseModelError."""
    from adapters.base import load_spec
    from trainer.config import CONFIGS

    if path is None:
        folder = Path(base).expanduser()
        if not folder.is_dir():
            slug = load_spec(base).slug
            folder = home().models / slug
            shipped = CONFIGS / "bases" / f"{slug}.config.json"
            path = shipped if shipped.is_file() and not (folder / "config.json").is_file() else None
        path = path or folder / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read. Run `lorikeet base prepare`, or give --model-config.") from exc


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "< 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
