"""The command's table, and that every command explains itself."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorikeet import COMMANDS, EXTRAS, app, load_command, main

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


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `lorikeet …` tells on standard error as it fails."""
    monkeypatch.setattr(sys, "argv", ["lorikeet", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "environment", "tells"),
    [
        (["tenants", "list"], {"LORIKEET_PORT": "many"}, "port: Input should be a valid integer"),
        (["tenants", "list"], {"LORIKEET_REQUESTS__MAX_QUEUE": "0"}, "requests.max_queue: Input should be greater"),
        (["tenants", "list"], {"LORIKEET_LOG_LEVEL": "loud"}, "log_level: String should match"),
        (["tenants", "list"], {"LORIKEET_HOME": "/proc/lorikeet"}, "No such file or directory: /proc/lorikeet"),
        (["up"], {"LORIKEET_ENGINE": "steam"}, "There is no engine profile 'steam'"),
        (["status"], {}, "No API key"),
        (["status", "--key", "lk-…"], {}, "That is no API key"),
        (["status", "--key", "lk-1"], {"LORIKEET_URL": "http://127.0.0.1:many"}, "is no address"),
        (["base", "show", "nobody"], {}, "There is no base model configuration"),
        (["train", "nothing"], {}, "There is no configuration nothing"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_in_one_line_without_a_traceback(
    arguments: list[str],
    environment: dict[str, str],
    tells: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in ({"LORIKEET_HOME": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LORIKEET_API_KEY", raising=False)
    shown = said(arguments, monkeypatch, capsys)
    assert tells in shown
    assert shown.startswith("error: ")
    assert len(shown.splitlines()) == 1


def test_a_package_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not there
    for name in [name for name in sys.modules if name.startswith("loadtests")]:
        monkeypatch.delitem(sys.modules, name)
    shown = said(["loadtest", "report", str(tmp_path)], monkeypatch, capsys)
    assert "needs the package jinja2" in shown
    assert "lorikeet[loadtests]" in shown


def test_the_extras_that_are_named_bring_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, extra in EXTRAS.items():
        distribution = {"rouge_score": "rouge-score", "sklearn": "scikit-learn"}.get(package, package)
        assert any(line.startswith(distribution) for line in project["optional-dependencies"][extra]), package
