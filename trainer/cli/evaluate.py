"""`lorikeet eval`: what a served adapter is worth."""

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapters.home import home
from trainer.cli.common import (
    DEFAULT_PORT,
    HELP,
    JsonOption,
    SetOption,
    err,
    fetch_known,
    operator_key,
    out,
    print_json,
    spinner,
)

eval_app = typer.Typer(add_completion=False, context_settings=HELP)


@eval_app.command()
def evaluate(
    config: Annotated[str, typer.Argument(help="YAML file, or a shipped name such as reuters-topics.")],
    model: Annotated[str, typer.Option(help="The adapter as served: support, or pinned: support@2.")],
    predecessor: Annotated[str | None, typer.Option(help="Another version to compare with: support@1.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's served name. Default: the adapter's own.")] = None,
    url: Annotated[
        str | None, typer.Option(envvar="LORIKEET_URL", help="The gateway. Default: this machine's.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="LORIKEET_API_KEY", help="Default: this machine's operator key.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Act for this tenant, with an operator's key. Default: the only one there is.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Fewer or more rows than the configuration says.")] = None,
    overrides: SetOption = None,
    manifest: Annotated[
        Path | None, typer.Option("--write-manifest", metavar="FOLDER", help="Adapter folder to write the scores into.")
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="JSON of every answer. Default: LORIKEET_HOME/runs/eval-NAME-TIME.json."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a served adapter against its base, plain and few-shot, through the gateway.

    The same rows and the same server for all, so what is judged is what users get; the difference to the few-shot base is
    tested for chance, row by row.
    """
    from trainer.config import find_config, load_config
    from trainer.evaluation import report
    from trainer.evaluation.client import ChatClient
    from trainer.evaluation.compare import Evaluation, evaluate, load_rows, subjects_for
    from trainer.evaluation.config import EvalConfig

    address = url or f"http://127.0.0.1:{os.environ.get('LORIKEET_PORT') or DEFAULT_PORT}"
    if key is None:
        from adapters.stored import only_tenant

        key, tenant = operator_key(address), tenant or only_tenant()
    path = find_config(config, "eval")
    settings = load_config(path, EvalConfig, [*(overrides or ()), *([f"rows={rows}"] if rows else [])])
    with spinner() as tell:
        chosen, examples = load_rows(settings, relative_to=path.parent, fetch=lambda name: fetch_known(name, tell))

    async def run() -> Evaluation:
        with Progress(
            TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err
        ) as bar:
            async with ChatClient(address, key, tenant=tenant, timeout_s=settings.timeout_s) as client:
                subjects = await subjects_for(client, model, base=base, predecessor=predecessor, examples=examples)
                tasks = {subject.name: bar.add_task(subject.name, total=len(chosen)) for subject in subjects}
                return await evaluate(settings, client, subjects, chosen, advance=lambda name: bar.advance(tasks[name]))

    evaluation = asyncio.run(run())
    stamp = time.strftime("%Y%m%d-%H%M%S")
    written = report.write_document(evaluation, out_file or home().runs / f"eval-{settings.name}-{stamp}.json")
    if manifest is not None:
        report.add_to_manifest(evaluation, manifest)
    if as_json:
        print_json(report.document(evaluation) | {"file": str(written)})
        return
    out.print(report.samples_table(evaluation))
    out.print(report.metrics_table(evaluation))
    out.print(report.verdict(evaluation), soft_wrap=True)
    out.print(f"Every answer: {written}", soft_wrap=True, highlight=False)
