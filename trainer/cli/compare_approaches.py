"""`lorikeet compare-approaches`: approach × accuracy × P95 × monthly cost, from measurements."""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, SetOption, fetch_known, out, print_json, spinner
from trainer.cli.evaluate import KeyOption, TenantOption, UrlOption, access, progress_bar
from trainer.errors import ConfigError

compare_app = typer.Typer(add_completion=False, context_settings=HELP)


@compare_app.command()
def compare_approaches(
    config: Annotated[str, typer.Argument(help="YAML file, or a shipped name such as approaches-reuters.")],
    url: UrlOption = None,
    key: KeyOption = None,
    tenant: TenantOption = None,
    overrides: SetOption = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Default: LORIKEET_HOME/runs/approaches-NAME-TIME.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Base, few-shot, tuned and merged on one task: accuracy, format, P95, tokens, and what a month costs at your volume.

    Every model has to be served now; one that is not is left out, and that is said. Leaves approaches.json and a plot.
    """
    from trainer.config import find_config, load_config
    from trainer.evaluation.approaches import Approach, Comparison, Measurement, document, draw, measure_approach
    from trainer.evaluation.client import ChatClient
    from trainer.evaluation.compare import load_rows
    from trainer.evaluation.config import EvalConfig

    path = find_config(config, "eval/approaches")
    comparison = load_config(path, Comparison, overrides or ())
    own = path.parent / comparison.eval
    task_path = own if own.is_file() else find_config(comparison.eval, "eval")
    changes = [f"rows={comparison.rows}"] if comparison.rows else []
    shots = max(one.shots for one in comparison.approaches)
    settings = load_config(task_path, EvalConfig, [*changes, f"shots={shots}"])
    schema = settings.schema_for(task_path.parent)
    who = access(url, key, tenant)
    with spinner() as tell:
        rows, examples = load_rows(settings, relative_to=task_path.parent, fetch=lambda name: fetch_known(name, tell))
    served = [one for one in comparison.approaches if one.model is not None]
    left_out = [f"{one.name}: not served, no model is named" for one in comparison.approaches if one.model is None]
    if not served:
        raise ConfigError(f"{path} names no model that is served.")

    def client_for(approach: Approach) -> ChatClient:
        if approach.url is None:
            return who.client(settings.timeout_s)
        found = os.environ.get(approach.key_env) if approach.key_env else who.key
        if not found:
            raise ConfigError(f"{approach.name}: set {approach.key_env} to the API key of {approach.url}.")
        return ChatClient(approach.url, found, timeout_s=settings.timeout_s)

    async def run() -> list[Measurement]:
        measured = []
        with progress_bar() as bar:
            for approach in served:
                task = bar.add_task(approach.name, total=len(rows))
                async with client_for(approach) as client:
                    measured.append(
                        await measure_approach(
                            approach,
                            comparison,
                            settings,
                            client,
                            rows,
                            examples,
                            schema=schema,
                            advance=lambda task=task: bar.advance(task),  # type: ignore[misc]
                        )
                    )
        return measured

    measured = asyncio.run(run())
    folder = out_folder or home().runs / f"approaches-{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    found = document(comparison, measured, left_out) | {"task": settings.name, "rows": len(rows)}
    (folder / "approaches.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot = folder / "approaches.svg"
    draw(measured, plot)
    if as_json:
        print_json(found | {"folder": str(folder)})
        return
    table = Table(
        title=f"{settings.name} on {len(rows)} rows, {comparison.requests_per_month:,} requests a month",
        title_justify="left",
    )
    for column in (
        "approach",
        measured[0].metric.replace("_", " "),
        "95 %",
        "valid",
        "P95",
        "tokens in + out",
        "a month",
    ):
        table.add_column(column, justify="left" if column == "approach" else "right")
    for one in measured:
        machines = "" if one.machines is None else f" ({one.machines} machine{'s' * (one.machines > 1)})"
        table.add_row(
            one.name,
            f"{100 * one.score.value:.1f} %",
            f"{100 * one.score.low:.0f}…{100 * one.score.high:.0f}",
            f"{100 * one.valid.value:.0f} %",
            f"{one.p95_s:.2f} s",
            f"{one.prompt_tokens:.0f} + {one.output_tokens:.0f}",
            f"{one.cost_per_month:,.2f}{machines}",
        )
    out.print(table)
    for sentence in left_out:
        out.print(f"Left out: {sentence}.", soft_wrap=True)
    out.print(f"Figures and plot: {folder}", soft_wrap=True, highlight=False)
