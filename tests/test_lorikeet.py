"""The command's table, and that every command explains itself."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from lorikeet import COMMANDS, app, load_command

runner = CliRunner()


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from leaves(child, (*path, name))


def test_the_help_lists_every_command_of_the_table() -> None:
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in shown.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page_worth_reading(name: str) -> None:
    for path, command in leaves(load_command(name), (name,)):
        shown = runner.invoke(app, [*path, "--help"])
        assert shown.exit_code == 0, shown.output
        assert len(command.help or "") > 10, f"{path} does not say what it does"
        for parameter in command.params:
            if parameter.name != "help" and not getattr(parameter, "hidden", False):
                assert getattr(parameter, "help", None), f"{path}: {parameter.name} is not explained"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_listing_and_creating_commands_speak_json(name: str) -> None:
    for path, command in leaves(load_command(name), (name,)):
        if path[-1] in {"list", "create", "status", "adapters", "engine", "push", "inspect", "promote", "rollback"}:
            options = {option for parameter in command.params for option in parameter.opts}
            assert "--json" in options or hasattr(command, "commands"), f"{path} has no --json"


def test_an_unknown_command_is_told_apart_from_the_known_ones() -> None:
    shown = runner.invoke(app, ["serf"])
    assert shown.exit_code == 2
    assert "No such command" in shown.output
