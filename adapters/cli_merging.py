"""`lorikeet merge`, `fuse`, `convert` and `fit`: thin layers over their modules."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.base import DEFAULT_BASE, find_base
from adapters.cli import BaseOption, Json, print_json, progress
from adapters.errors import MergeError
from adapters.home import home
from adapters.ladder import Rung, rung_rows
from adapters.names import parse_reference
from adapters.peft_format import CONFIG_FILE
from adapters.stored import only_tenant, stored_adapter

if TYPE_CHECKING:
    from adapters.derive import Derived, Parent
    from adapters.fuse import Fused
    from adapters.merge import ParityReport
    from adapters.parity import Figures, Reference
    from adapters.served import ServedModel

merge_app = typer.Typer(add_completion=False)
fuse_app = typer.Typer(add_completion=False)
convert_app = typer.Typer(add_completion=False)
fit_app = typer.Typer(add_completion=False)

WORST_LAYERS = 8
AdapterArgument = Annotated[
    str, typer.Argument(help="Adapter folder, or a stored one: support, support@2, acme/support@2.")
]
OutOption = Annotated[Path | None, typer.Option(help="Folder for the new adapter; must not exist yet.")]
PushOption = Annotated[
    str | None, typer.Option("--push", help="Upload it as a new version of this adapter, to the gateway at --url.")
]
UrlOption = Annotated[str, typer.Option(envvar="LORIKEET_URL", help="Address of the gateway to push to.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help='JSONL of prompts to compare on besides the goldens: rows with "messages", "prompt" or "text". Default: six '
        "general ones.",
        exists=True,
        dir_okay=False,
    ),
]
AcceptOption = Annotated[
    str, typer.Option(help="Why the result may be further from its original than the limits. Goes into the report.")
]
RankOption = Annotated[
    int, typer.Option(min=1, max=512, help="Rank of the result. Engines serve up to their max_rank.")
]
LOCAL = "http://127.0.0.1:8080"


@merge_app.command()
def merge(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option(help="Folder for the merged model; must not exist yet.")],
    base: BaseOption = DEFAULT_BASE,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the base is saved.")
    ] = None,
    parity: Annotated[
        Literal["full", "weights"],
        typer.Option(
            help="full: log-probabilities and greedy texts, with the whole model in memory in float32. weights: every saved "
            "tensor against its exact value, one at a time."
        ),
    ] = "full",
    prompts: PromptsOption = None,
    served: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Also ask this running gateway for the adapter's answers: a rung of the ladder."
        ),
    ] = None,
    served_as: Annotated[
        str | None, typer.Option(help="The adapter's name there. Default: as it was given here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base model, and prove that the result is equal to base + adapter.

    The result is a prepared base of its own, with a parity report and a card: serve it with LORIKEET_BASE=DIR. Outside the
    tolerance nothing is kept, and an interrupted merge leaves nothing that the next one minds.
    """
    from adapters.merge import merge_adapter

    base_folder = find_base(base, home().models)
    with adapter_folder(adapter) as folder, progress() as report:
        asked = (served, asking(served, served_as or adapter)) if served else None
        result = merge_adapter(
            base_folder, folder, out, dtype=dtype, parity=parity, prompts=prompts, served=asked, report=report
        )
    if as_json:
        print_json(result.as_dict())
    else:
        show_merge(result)


@fuse_app.command()
def fuse(
    adapters: Annotated[list[str], typer.Argument(help="Two or more: folders, or stored ones such as a@1 b@4.")],
    out: OutOption = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each, such as 0.6,0.4. Default: equal shares of one.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="cat (the exact sum, ranks added), svd (the nearest of --max-rank), or PEFT's linear, ties, dare_linear, "
            "dare_ties, magnitude_prune. Default: cat where its rank is served, else svd."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Try the methods on each adapter's own goldens, and take the nearest.")
    ] = False,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank the engine serves.")] = 16,
    density: Annotated[float, typer.Option(help="Share of the values that ties, dare and magnitude_prune keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the methods that drop values at random.")] = 0,
    push: PushOption = None,
    url: UrlOption = LOCAL,
    prompts: PromptsOption = None,
    base: BaseOption = DEFAULT_BASE,
    as_json: Json = False,
) -> None:
    """Make one adapter of several, and say how far it is from each on that one's goldens.

    The result has a manifest like a trained adapter's: its parents by digest, their data and licences, goldens of its own.
    """
    from adapters.derive import read_parent
    from adapters.fuse import fuse_adapters

    base_folder = find_base(base, home().models)
    shares = read_weights(weights)
    with made_in(out, push) as folder, several(adapters) as folders, progress() as report:
        parents = [read_parent(name, each, base_folder) for name, each in zip(adapters, folders, strict=True)]
        result = fuse_adapters(
            base_folder,
            parents,
            folder,
            name=push or folder.name,
            weights=shares,
            method=method,
            measure=measure,
            max_rank=max_rank,
            density=density,
            seed=seed,
            prompts=prompts,
            report=report,
        )
        pushed = upload(folder, push, url)
    if as_json:
        print_json({**result.as_dict(), "pushed": pushed})
        return
    show_fusion(result, parents)
    show_derived(result.derived, pushed, out)


@convert_app.command()
def convert(
    adapter: AdapterArgument,
    out: OutOption = None,
    to: Annotated[Literal["lora"], typer.Option(help="What to make of it.")] = "lora",
    rank: RankOption = 16,
    accept: AcceptOption = "",
    push: PushOption = None,
    url: UrlOption = LOCAL,
    prompts: PromptsOption = None,
    base: BaseOption = DEFAULT_BASE,
    as_json: Json = False,
) -> None:
    """Publish a DoRA, or another kind that PEFT can convert, as a LoRA that a shared engine serves.

    It is the nearest LoRA of that rank in every layer, and is held against the original on its goldens and on other prompts;
    outside the limits nothing is kept, unless --accept says why.
    """
    from adapters.convert import convert_adapter, read_convertible

    base_folder = find_base(base, home().models)
    with made_in(out, push) as folder, adapter_folder(adapter) as source, progress() as report:
        parent = read_convertible(adapter, source, base_folder)
        result = convert_adapter(
            base_folder,
            parent,
            folder,
            rank=rank,
            name=push or folder.name,
            accept=accept,
            prompts=prompts,
            report=report,
        )
        pushed = upload(folder, push, url)
    tell(result, pushed, out, as_json=as_json)


@fit_app.command()
def fit(
    adapter: AdapterArgument,
    out: OutOption = None,
    rank: RankOption = 16,
    accept: AcceptOption = "",
    push: PushOption = None,
    url: UrlOption = LOCAL,
    prompts: PromptsOption = None,
    base: BaseOption = DEFAULT_BASE,
    as_json: Json = False,
) -> None:
    """Reduce an adapter to a rank the engine serves, and say what that costs, layer by layer and on its goldens."""
    from adapters.derive import read_parent
    from adapters.fit import fit_adapter

    base_folder = find_base(base, home().models)
    with made_in(out, push) as folder, adapter_folder(adapter) as source, progress() as report:
        parent = read_parent(adapter, source, base_folder)
        result = fit_adapter(
            base_folder,
            parent,
            folder,
            rank=rank,
            name=push or folder.name,
            accept=accept,
            prompts=prompts,
            report=report,
        )
        pushed = upload(folder, push, url)
    tell(result, pushed, out, as_json=as_json)


@contextmanager
def adapter_folder(adapter: str) -> Iterator[Path]:
    """The folder that was named, or a stored version's files for as long as the block lasts. Raises MergeError."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-adapter-") as temporary:
        folder = Path(adapter)
        if not folder.is_dir():
            folder = stored_adapter(adapter, Path(temporary) / "adapter")
        if not (folder / CONFIG_FILE).is_file():
            raise MergeError(f"{folder} holds no {CONFIG_FILE}.")
        yield folder


@contextmanager
def several(adapters: Sequence[str]) -> Iterator[list[Path]]:
    if not adapters:
        yield []
        return
    with adapter_folder(adapters[0]) as first, several(adapters[1:]) as rest:
        yield [first, *rest]


@contextmanager
def made_in(out: Path | None, push: str | None) -> Iterator[Path]:
    """Where to write: `out`, or a folder that is gone when what it holds was pushed. Raises MergeError for neither, or for one
    that holds something.
    """
    if out is None and push is None:
        raise MergeError("Say where the result is to go: --out DIR, --push NAME, or both.")
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MergeError(f"{out} exists already. Give a folder that does not.")
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="lorikeet-made-") as temporary:
        yield Path(temporary) / str(push)


def read_weights(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as exc:
        raise MergeError(f"'{text}' are no weights. Write them like 0.6,0.4.") from exc


def served_model(url: str, model: str) -> "ServedModel":
    """The model at a gateway; on this machine the operator's key acts for the model's tenant, or the only one."""
    from adapters.served import ServedModel, find_key

    reference = parse_reference(model)
    tenant = (reference.tenant if reference else None) or only_tenant()
    return ServedModel(url.rstrip("/").removesuffix("/v1"), model, find_key(url), tenant)


def asking(url: str, model: str) -> "Callable[[Reference], Figures]":
    return served_model(url, model).hold


def upload(folder: Path, push: str | None, url: str) -> Mapping[str, object] | None:
    return served_model(url, push).upload(folder, push) if push else None


def tell(result: "Derived", pushed: Mapping[str, object] | None, out: Path | None, *, as_json: bool) -> None:
    if as_json:
        print_json({**result.as_dict(), "pushed": pushed})
        return
    Console().print(rung_table(result.rungs, f"Against {result.rungs[0].against}"))
    show_derived(result, pushed, out)


def show_merge(result: "ParityReport") -> None:
    console = Console()
    if result.weights is not None:
        console.print(
            f"Compared by weights: {result.weights.changed} changed tensors within {result.weights.largest_error:g} last "
            f"places of their exact value, {result.weights.kept} equal to the base's bit for bit.",
            soft_wrap=True,
        )
    else:
        title = f"Parity on {result.tokens} tokens ({result.prompts}), against base + adapter in float32"
        console.print(rung_table(result.rungs, title))
        if result.effect is not None:
            console.print(
                f"The base without the adapter is {result.effect.mean_abs:.2g} away on average, with {result.effect.top1:.1%} "
                "of the first choices.",
                soft_wrap=True,
            )
    for note in result.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
    console.print(f"[green]Merged[/green] {result.layers} layers into {escape(result.out)}", soft_wrap=True)


def show_fusion(result: "Fused", parents: "Sequence[Parent]") -> None:
    """Methods by parents: KL to each on its own goldens."""
    table = Table(title="KL to each adapter on its own goldens, nats a token")
    for column in ("method", "rank", *(parent.name for parent in parents), ""):
        table.add_column(escape(column), overflow="fold")
    for each in result.tried:
        row = each.as_dict()
        remark = "taken" if each.method == result.derived.method else each.refused
        kls = [f"{distance['kl']:.2e}" for distance in row["distances"]] or [""] * len(parents)
        table.add_row(each.method, str(each.rank or ""), *kls, escape(remark))
    Console().print(table)


def show_derived(result: "Derived", pushed: Mapping[str, object] | None, out: Path | None) -> None:
    console = Console()
    if result.errors:
        lost = sorted(result.errors.items(), key=lambda item: -item[1])
        mean = sum(result.errors.values()) / len(result.errors)
        console.print(
            f"Left out of the updates: {mean:.2%} of a layer's norm on average; most in "
            + ", ".join(f"{module} ({share:.2%})" for module, share in lost[:WORST_LAYERS]),
            soft_wrap=True,
            highlight=False,
        )
    if not result.goldens:
        console.print(
            "[yellow]note:[/yellow] No goldens: none of the adapters it was made from has any.", soft_wrap=True
        )
    console.print(
        f"[green]Made[/green] an adapter of rank {result.rank} ({escape(result.method)}), digest {result.digest[:12]}"
        + (f", in {escape(str(out))}" if out else ""),
        soft_wrap=True,
    )
    if pushed:
        console.print(f"{pushed['adapter']}@{pushed['version']} is {pushed['status']}.", highlight=False)


def rung_table(rungs: Sequence[Rung], title: str) -> Table:
    table = Table(title=escape(title), box=None, pad_edge=False, header_style="bold")
    for column in ("", "on", "largest", "mean", "first\nchoice", "KL", "stopped", "same\ntext"):
        table.add_column(column, justify="left" if column in ("", "on") else "right", no_wrap=True)
    for rung in rungs:
        for cells in rung_rows(rung):
            table.add_row(*map(escape, cells))
    return table
