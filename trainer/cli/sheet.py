"""`lorikeet eval sheet`: answers for a person to read, and the marks read back."""

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel
from rich.prompt import Prompt
from rich.text import Text

from trainer.cli.common import HELP, JsonOption, out, print_json
from trainer.errors import ConfigError

sheet_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)

FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder with sheet.jsonl, as `lorikeet eval` leaves it.")
]
ByOption = Annotated[str | None, typer.Option(help="Who has read it: signs the sheet.")]
AttachOption = Annotated[
    str | None, typer.Option("--attach", metavar="NAME@VERSION", help="Store the signature with this version.")
]


@sheet_app.callback()
def sheet() -> None:
    """Answers for a person to read, with a place to mark each; a promotion policy may ask for it."""


@sheet_app.command("make")
def make(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="report.json that `lorikeet eval` wrote.")],
    folder: Annotated[Path, typer.Option("--out", help="Where the sheet goes.")],
    rows: Annotated[int, typer.Option(min=1, help="Answers on it.")] = 50,
    seed: Annotated[int, typer.Option(help="Draws them.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw a sheet from an evaluation: a page to mark in a browser, and its rows as JSONL."""
    from trainer.evaluation.report import read_document
    from trainer.evaluation.sheet import SHEET_FILE, choose_entries, write_sheet

    if (folder / SHEET_FILE).exists():
        raise ConfigError(f"{folder / SHEET_FILE} is there already and may hold marks. Name another folder.")
    entries = choose_entries(read_document(report), rows, seed=seed)
    page = write_sheet(entries, folder)
    if as_json:
        print_json({"page": str(page), "rows": len(entries)})
    else:
        out.print(f"{len(entries)} answers to read: {page}", soft_wrap=True, highlight=False)


@sheet_app.command("mark")
def mark(folder: FolderArgument) -> None:
    """Read and mark in the terminal: g good, b bad, s skip, q stop. Each mark is kept at once."""
    from dataclasses import replace

    from trainer.evaluation.sheet import SHEET_FILE, read_entries, write_entries, write_sheet

    entries = read_entries(folder / SHEET_FILE)
    for index, entry in enumerate(entries):
        if entry.verdict is not None:
            continue
        asked = "\n\n".join(message["content"] for message in entry.messages)
        out.print(Panel(Text(asked), title=f"{index + 1} of {len(entries)}", title_align="left"))
        out.print(Panel(Text(entry.given or "(nothing)"), title="answer", title_align="left"))
        choice = Prompt.ask("good, bad, skip or quit", choices=["g", "b", "s", "q"], console=out)
        if choice == "q":
            break
        if choice == "s":
            continue
        comment = Prompt.ask("why", default="", show_default=False, console=out) if choice == "b" else ""
        entries[index] = replace(entry, verdict="good" if choice == "g" else "bad", comment=comment)
        write_entries(entries, folder / SHEET_FILE)
    write_sheet(entries, folder)
    marked = sum(entry.verdict is not None for entry in entries)
    out.print(
        f"{marked} of {len(entries)} marked. To sign: lorikeet eval sheet import {folder} --by NAME", soft_wrap=True
    )


@sheet_app.command("import")
def import_marks(
    folder: FolderArgument,
    marks: Annotated[
        Path | None, typer.Argument(help="marks.jsonl that the page saved. None: the marks made in the terminal.")
    ] = None,
    by: ByOption = None,
    attach_to: AttachOption = None,
    url: Annotated[
        str | None, typer.Option(envvar="LORIKEET_URL", help="The gateway. Default: this machine's.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="LORIKEET_API_KEY", help="Default: this machine's operator key.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Act for this tenant, with an operator's key.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read marks back, sign the sheet, and store the signature with the version where it is named."""
    from trainer.evaluation.sheet import SHEET_FILE, read_entries, sign, with_marks, write_sheet

    if by is None:
        raise ConfigError("Who has read it? Sign with --by NAME.")
    entries = read_entries(folder / SHEET_FILE)
    if marks is not None:
        entries = with_marks(entries, read_entries(marks))
    signature = sign(entries, by=by, now_s=time.time())
    write_sheet(entries, folder)
    (folder / "signature.json").write_text(signature.model_dump_json(indent=1) + "\n", encoding="utf-8")
    gate = None
    if attach_to is not None:
        from adapters.evaluations import Evaluation
        from trainer.cli.evaluate import access
        from trainer.evaluation.served import attach, pin

        models = {entry.model for entry in entries}
        if models != {attach_to} and {model.partition("@")[0] for model in models} != {attach_to.partition("@")[0]}:
            raise ConfigError(f"The answers on the sheet are of {', '.join(sorted(models))}, not of {attach_to}.")

        async def run() -> dict[str, object]:
            async with access(url, key, tenant).client(60.0) as client:
                pinned = await pin(client, attach_to)
                return await attach(
                    client, pinned, Evaluation(model=pinned.model, digest=pinned.digest, sheet=signature)
                )

        gate = asyncio.run(run())
    if as_json:
        print_json(signature.model_dump() | {"gate": gate})
        return
    out.print(f"{signature.signed_by}: {signature.good} good, {signature.bad} bad of {signature.rows} answers.")
    if gate is not None:
        from trainer.cli.evaluate import tell_gate

        tell_gate(gate, str(attach_to))
