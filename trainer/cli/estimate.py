"""`lorikeet estimate`: what a run will take."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, SetOption, out, print_json
from trainer.errors import ConfigError

estimate_app = typer.Typer(add_completion=False, context_settings=HELP)


@estimate_app.command("estimate")
def estimate_command(
    config: Annotated[str, typer.Argument(help="Training configuration, or a shipped name such as reuters-topics.")],
    overrides: SetOption = None,
    model_config: Annotated[
        Path | None, typer.Option(help="A config.json. Default: that of the prepared base model.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows, where the configuration does not say.")] = 1000,
    tokens_per_row: Annotated[int | None, typer.Option(min=1, help="Default: half of max_tokens.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Parameters, memory, disk, time and cost of a run, for full, LoRA and QLoRA training; reads no weights."""
    from trainer.config import load_train_config
    from trainer.estimate import GPUS, Workload, estimate, read_shape

    settings, _ = load_train_config(config, overrides or ())
    shape = read_shape(read_model_json(model_config, settings.base))
    given_rows = settings.data.train_rows if settings.data else 24
    work = Workload(
        rows=given_rows or rows,
        tokens_per_row=tokens_per_row or settings.max_tokens // 2,
        epochs=settings.optimizer.epochs,
        batch_rows=settings.optimizer.batch_rows,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    lora = settings.lora
    found = [
        estimate(shape, method, rank=lora.r, target_modules=lora.target_modules, work=work)
        for method in ("lora", "qlora", "full")
    ]
    cores = os.cpu_count() or 1
    if as_json:
        print_json(
            {
                "workload": asdict(work),
                "methods": [
                    asdict(each)
                    | {
                        "peak_bytes": each.peak_bytes,
                        "smallest_gpu": each.smallest_gpu.name if each.smallest_gpu else None,
                        "cpu_seconds": round(each.cpu_seconds(cores), 1),
                        "gpus": [
                            {
                                "name": gpu.name,
                                "seconds": round(each.seconds_on(gpu), 1),
                                "usd": round(each.seconds_on(gpu) / 3600 * gpu.usd_per_hour, 4),
                            }
                            for gpu in GPUS
                        ],
                    }
                    for each in found
                ],
            }
        )
        return
    table = Table("", *(each.method for each in found), box=None, header_style="bold", pad_edge=False)
    table.add_row("trained parameters", *(f"{each.trainable:,}" for each in found))
    table.add_row("of", *(f"{each.parameters:,}" for each in found))
    for part in found[0].memory_bytes:
        table.add_row(f"memory: {part}", *(_size(each.memory_bytes[part]) for each in found))
    table.add_row("memory, peak", *(_size(each.peak_bytes) for each in found))
    table.add_row("disk", *(_size(each.disk_bytes) for each in found))
    table.add_row(f"time on {cores} CPU cores", *(_duration(each.cpu_seconds(cores)) for each in found))
    table.add_row("smallest GPU", *(each.smallest_gpu.name if each.smallest_gpu else "several" for each in found))
    for gpu in GPUS:
        spent = [each.seconds_on(gpu) for each in found]
        cells = [f"{_duration(each)}, ${each / 3600 * gpu.usd_per_hour:.2f}" for each in spent]
        table.add_row(f"on {gpu.name}", *cells)
    out.print(table)
    out.print(
        f"[dim]{work.rows} rows of about {work.tokens_per_row} tokens, {work.epochs:g} epochs. Formulas: estimate.py[/dim]"
    )


def read_model_json(path: Path | None, base: str) -> dict[str, Any]:
    """The model's config.json. Raises ConfigError, BaseModelError."""
    from adapters.base import load_spec

    if path is None:
        folder = Path(base).expanduser()
        path = (folder if folder.is_dir() else home().models / load_spec(base).slug) / "config.json"
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
