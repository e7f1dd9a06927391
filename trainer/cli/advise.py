"""`lorikeet advise`: prompt, retrieve or fine-tune?"""

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.prompt import Confirm, IntPrompt, Prompt

from adapters.wording import one_line
from trainer.cli.common import DEFAULT_PORT, HELP, JsonOption, err, operator_key, out, print_json
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.advise import Advice, Evidence

advise_app = typer.Typer(add_completion=False, context_settings=HELP)
CONCURRENCY = 8


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
    good_enough: Annotated[
        float | None, typer.Option(help="Share of right answers you would go live with.  [default: 0.9]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Examples, as rows of chat or prompt and completion: the cheap rungs are tried on some of them."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --data: the served model to try, such as the base.")] = None,
    url: Annotated[
        str | None,
        typer.Option(envvar="LORIKEET_URL", help="Any OpenAI-style server. Default: this machine's gateway."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="LORIKEET_API_KEY", help="Default: this machine's operator key.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Act for this tenant, with an operator's key. Default: the only one there is.")
    ] = None,
    rows: Annotated[int, typer.Option(min=10, max=1000, help="With --data: rows to ask on each rung.")] = 80,
    shots: Annotated[int, typer.Option(min=0, max=64, help="With --data: examples in the few-shot prompt.")] = 8,
    context_field: Annotated[
        str, typer.Option(help="With --data: field of a row with the paragraph that holds its answer.")
    ] = "context",
    as_json: JsonOption = False,
) -> None:
    """Prompting, retrieval, fine-tuning or a combination for a task, with the reasons and what would change the answer.

    From facts in a file, in flags, or asked for on the terminal when neither is given. With --data and --model it measures
    first: the plain prompt, a few examples in it, and (where rows carry one) the right paragraph pasted in, on the same rows.
    What you state stands; what you do not state is taken from the measurement.
    """
    from trainer.advise import TaskFacts, advise

    flags = {
        "examples": examples,
        "gap": gap,
        "facts_change": facts_change,
        "strict_format": strict_format,
        "latency_ms": latency_ms,
        "cost_matters": cost_matters,
        "few_shot_works": few_shot_works,
        "good_enough": good_enough,
    }
    stated = {name: value for name, value in flags.items() if value is not None}
    if facts_file is not None:
        stated = read_facts(facts_file) | stated
    elif not stated and data is None:
        if not (sys.stdin.isatty() and err.is_terminal):
            raise ConfigError(
                "Nothing is known of the task. Give a file with facts, flags (--help), or --data and --model."
            )
        stated = ask_facts(err)
    try:
        facts = TaskFacts.model_validate(stated)
    except ValidationError as exc:
        raise ConfigError(f"The facts cannot be used: {one_line(exc)}") from exc
    evidence = None
    if data is not None:
        if model is None:
            raise ConfigError(
                "--data needs --model: which served model is to be tried? `lorikeet status` names the base."
            )
        evidence = measure(
            data, model, url=url, key=key, tenant=tenant, rows=rows, shots=shots, context_field=context_field
        )
    advice = advise(facts, evidence)
    if as_json:
        print_json(advice.model_dump(mode="json"))
        return
    show(advice)


def show(advice: "Advice") -> None:
    out.print(f"[bold]{' + '.join(advice.approaches)}[/bold]")
    for reason in advice.reasons:
        out.print(f"  • {escape(reason)}", soft_wrap=True, highlight=False)
    for change in advice.would_change:
        out.print(f"  [dim]↻ {escape(change)}[/dim]", soft_wrap=True, highlight=False)
    out.print(f"Next: {escape(advice.next_command)}", soft_wrap=True, highlight=False)


def read_facts(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as exc:
        raise ConfigError(f"{path} cannot be read: {one_line(exc)}") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a mapping of facts.")
    return found


def ask_facts(console: Console, stream: TextIO | None = None) -> dict[str, Any]:
    """Each fact as a question. stream: where answers come from, standard input by default."""
    yes_no = {"yes": True, "no": False}
    tried = Prompt.ask(
        "Does a prompt with a few examples already do?",
        choices=["yes", "no", "not tried"],
        default="not tried",
        console=console,
        stream=stream,
    )
    found: dict[str, Any] = {
        "few_shot_works": yes_no.get(tried),
        "examples": IntPrompt.ask(
            "How many good examples do you have (input with the answer you want)?",
            default=0,
            console=console,
            stream=stream,
        ),
        "gap": Prompt.ask(
            "What does the base model lack: facts (knowledge), a way of answering (behaviour), both, none?",
            choices=["knowledge", "behaviour", "both", "none"],
            default="none",
            console=console,
            stream=stream,
        ),
        "facts_change": Prompt.ask(
            "How often do the facts change that answers depend on?",
            choices=["never", "yearly", "monthly", "daily"],
            default="never",
            console=console,
            stream=stream,
        ),
        "strict_format": Confirm.ask(
            "Must answers follow a schema, a label set or a tool protocol?",
            default=False,
            console=console,
            stream=stream,
        ),
        "cost_matters": Confirm.ask(
            "So many requests that a long prompt in each is too dear?", default=False, console=console, stream=stream
        ),
    }
    latency_ms = IntPrompt.ask(
        "Milliseconds an answer may take (0: no tight limit)?", default=0, console=console, stream=stream
    )
    return found | ({"latency_ms": latency_ms} if latency_ms > 0 else {})


def measure(
    data: Path,
    model: str,
    *,
    url: str | None,
    key: str | None,
    tenant: str | None,
    rows: int,
    shots: int,
    context_field: str,
) -> "Evidence":
    """Climb the rungs on a served model, with a bar on stderr. Raises DataError, EvaluationError, ConfigError."""
    from trainer.advise import RungName
    from trainer.data.chat import Row
    from trainer.evaluation.client import Answer, ChatClient
    from trainer.rungs import climb, plan_ladder, read_examples

    examples = read_examples(data, context_field=context_field)
    if len(examples.kept) < 2:
        raise ConfigError(f"{data} holds {len(examples.kept)} distinct rows; trying a model on it takes two or more.")
    ladder = plan_ladder(examples, rows=rows, shots=shots)
    address = url or f"http://127.0.0.1:{os.environ.get('LORIKEET_PORT') or DEFAULT_PORT}"
    if key is None:
        from adapters.stored import only_tenant

        key, tenant = operator_key(address), tenant or only_tenant()

    async def run(bar: Progress) -> "Evidence":
        tasks = {name: bar.add_task(name, total=len(ladder.asked)) for name in ladder.rungs}
        async with ChatClient(address, key, tenant=tenant) as client:

            async def ask(rung: RungName, prompts: list[Row], max_tokens: int) -> list[Answer]:
                return await client.answers(
                    model,
                    prompts,
                    max_tokens=max_tokens,
                    concurrency=CONCURRENCY,
                    advance=lambda: bar.advance(tasks[rung]),
                )

            return await climb(ladder, ask, model=model, data=str(data), distinct=examples.distinct)

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        return asyncio.run(run(bar))
