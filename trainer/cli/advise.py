"""`lorikeet advise`: prompt, retrieve or fine-tune?"""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from adapters.wording import one_line
from trainer.cli.common import HELP, JsonOption, out, print_json
from trainer.errors import ConfigError

advise_app = typer.Typer(add_completion=False, context_settings=HELP)


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
