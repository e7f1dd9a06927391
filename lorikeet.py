"""The `lorikeet` command. It mounts each room's commands and imports a room only when one of its commands runs."""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Mount:
    """Where a command lives: `module:attribute` is a typer.Typer. Its help is repeated here so `--help` imports no room."""

    target: str
    help: str


COMMANDS: dict[str, Mount] = {
    "serve": Mount("gateway.cli.running:serve_app", "Run gateway and engine in the foreground."),
    "up": Mount("gateway.cli.running:up_app", "Start gateway and engine in the background and wait for a real answer."),
    "down": Mount(
        "gateway.cli.running:down_app", "Stop what `up` started; leaves no process, socket or shared memory."
    ),
    "status": Mount("gateway.cli.running:status_app", "Is it ready, and what does each engine hold?"),
    "engine": Mount("gateway.cli.running:engine_app", "State, LoRA slots and resident adapters of each engine."),
    "tenants": Mount("gateway.cli.access:tenants_app", "Create, list and archive tenants."),
    "keys": Mount("gateway.cli.access:keys_app", "Create, list, rotate and revoke API keys."),
    "limits": Mount(
        "gateway.cli.access:limits_app", "Requests, tokens, adapters, bytes and money of tenants and keys."
    ),
    "audit": Mount("gateway.cli.access:audit_app", "Who changed what."),
    "push": Mount("gateway.cli.adapters:push_app", "Upload an adapter folder as a new version."),
    "adapters": Mount("gateway.cli.adapters:adapters_app", "List adapters, or the versions of one."),
    "promote": Mount("gateway.cli.adapters:promote_app", "Make a version the one that answers to the name."),
    "rollback": Mount("gateway.cli.adapters:rollback_app", "Go back to the version before."),
    "deploy": Mount("gateway.cli.deployments:deploy_app", "Give a merged version an engine of its own."),
    "undeploy": Mount("gateway.cli.deployments:undeploy_app", "Take a version's own engine down."),
    "deployments": Mount("gateway.cli.deployments:deployments_app", "Versions with an engine of their own."),
    "choose": Mount("gateway.cli.choose:choose_app", "Hot-swapped or merged? Measure both forms of a version."),
    "usage": Mount("gateway.cli.usage:usage_app", "Requests, tokens and their cost, by day, adapter or tenant."),
    "requests": Mount("gateway.cli.usage:requests_app", "Where one request's time went, and what it was charged."),
    "base": Mount("adapters.cli:base_app", "Prepare and inspect base models."),
    "inspect": Mount(
        "adapters.cli:inspect_app", "Show an adapter folder, and every fault that keeps it from being served."
    ),
    "merge": Mount("adapters.cli_merging:merge_app", "Fold an adapter into its base model, with a parity report."),
    "fuse": Mount("adapters.cli_merging:fuse_app", "Make one adapter of several, measured on each one's goldens."),
    "convert": Mount("adapters.cli_merging:convert_app", "Publish a DoRA as a LoRA that a shared engine serves."),
    "fit": Mount("adapters.cli_merging:fit_app", "Reduce an adapter to a rank the engine serves."),
    "quantize": Mount(
        "adapters.cli_quantize:quantize_app", "Make a merged model smaller for vLLM, with a parity report."
    ),
    "export": Mount(
        "adapters.cli_quantize:export_app", "Write a model in another program's format: GGUF for llama.cpp."
    ),
    "advise": Mount("trainer.cli.advise:advise_app", "Prompt, retrieve or fine-tune? An answer with its reasons."),
    "estimate": Mount(
        "trainer.cli.estimate:estimate_app", "Parameters, memory, time and cost of a training run, before it."
    ),
    "data": Mount("trainer.cli.data:data_app", "Fetch and build data sets."),
    "train": Mount("trainer.cli.train:train_app", "Train an adapter from a configuration file."),
    "eval": Mount("trainer.cli.evaluate:eval_app", "Score an adapter against its base, plain and few-shot."),
    "jobs": Mount("gateway.cli.jobs:jobs_app", "Fine-tuning jobs: list, follow, cancel, pause, resume."),
    "worker": Mount("trainer.cli.worker:worker_app", "Train what was asked for over the fine-tuning API."),
    "compare-approaches": Mount(
        "trainer.cli.compare_approaches:compare_app",
        "Prompting, tuning and merging on one task: accuracy, P95, cost.",
    ),
    "loadtest": Mount("loadtests.cli:app", "Measure P95 under load, with an exit code."),
}


# Packages that only some commands need -> the extra of pyproject.toml that brings them.
EXTRAS = {
    **dict.fromkeys(
        (
            "datasets",
            "jsonschema",
            "matplotlib",
            "peft",
            "rouge_score",
            "scipy",
            "sklearn",
            "torch",
            "transformers",
            "trl",
        ),
        "trainer",
    ),
    "jinja2": "loadtests",
    "vllm": "engine-cpu",
}


class LazyGroup(TyperGroup):
    """Lists every command from the table and imports a command's module when that command is called.

    Typer carries click inside itself without exporting its types, hence Any.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the list of commands needs: name and help."""
        mount = COMMANDS.get(cmd_name)
        return TyperCommand(cmd_name, help=mount.help) if mount else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if command is not None and name else command, rest


def load_command(name: str) -> Any:
    """The real command, with its options: imports the room it lives in."""
    module, attribute = COMMANDS[name].target.split(":")
    command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
    command.name = name
    command.help = command.help or COMMANDS[name].help
    unwrap_help(command)
    return command


def unwrap_help(command: Any) -> None:
    """Docstrings are wrapped for readers of the code; on a terminal a paragraph flows."""
    if command.help and "\b" not in command.help:
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help))
    for child in getattr(command, "commands", {}).values():
        unwrap_help(child)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Many fine-tuned models served from one base model.",
)


@app.callback()
def _root() -> None:
    """Many fine-tuned models served from one base model."""


def main() -> None:
    """Entry point: a room's own errors become one red line and exit code 1, never a traceback. So do a file that the
    system would not let us read or write, and a package of an extra that is not installed.
    """
    try:
        app()
    except OSError as exc:
        if exc.filename is None:
            raise
        fail(f"{exc.strerror}: {exc.filename}")
    except ModuleNotFoundError as exc:
        package = (exc.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        fail(
            f"This needs the package {package}, which is not installed here. In a checkout: make install-dev. Elsewhere: "
            f"pip install 'lorikeet[{EXTRAS[package]}]'"
        )
    except Exception as exc:
        if not getattr(type(exc), "__module__", "").startswith(("adapters.", "gateway.", "trainer.", "loadtests.")):
            raise
        fail(str(exc))


def fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, markup=True, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
