"""`lorikeet data build` and `inspect`: shipped configurations load, and what is printed helps."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.data import data_app
from trainer.config import CONFIGS, load_config
from trainer.data.card import read_dataset
from trainer.data.recipe import BuildConfig
from trainer.errors import ConfigError

SHIPPED = sorted((CONFIGS / "datasets").glob("*.yaml"))
ANSWER = {"role": "assistant", "content": "A long enough answer, and a good one."}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_config(path, BuildConfig).name == path.stem


def test_the_example_of_every_option_names_every_option_and_says_the_defaults() -> None:
    path = CONFIGS / "datasets" / "every-option.yaml"
    config = load_config(path, BuildConfig)
    assert config.model_fields_set == set(BuildConfig.model_fields)
    for part in (config.length, config.quality, config.privacy, config.duplicates, config.split):
        assert part.model_fields_set == set(type(part).model_fields)
        assert part == type(part)()


def test_the_example_of_every_option_is_built(tmp_path: Path) -> None:
    arguments = [
        "build",
        "every-option",
        "--out",
        str(tmp_path / "set"),
        "--set",
        "base=null",
        "--set",
        "privacy.action=off",
    ]
    result = CliRunner().invoke(data_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "No evaluation row is trained on" in result.stdout
    assert f"data.folder={tmp_path / 'set'}" in result.stdout.replace("\n", "")
    card = read_dataset(tmp_path / "set").card
    assert card.train.rows > 200
    assert [source.licence for source in card.sources] == ["CC-BY-4.0", "CC0-1.0"]


def test_a_build_can_be_told_in_json(tmp_path: Path) -> None:
    arguments = ["build", "every-option", "--set", "base=null", "--set", "privacy.action=off", "--json"]
    document = json.loads(CliRunner().invoke(data_app, arguments, catch_exceptions=False).stdout)
    assert Path(document["folder"]) == tmp_path / "home" / "datasets" / "built" / "every-option"
    assert document["leak_proof"]["same_prompt"] == 0


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.action"):
        CliRunner().invoke(data_app, ["build", "every-option", "--set", "privacy.action=burn"], catch_exceptions=False)


def test_a_file_is_inspected_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "Hello there?"}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Short."}]},
        {"messages": [ANSWER]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    result = CliRunner().invoke(data_app, ["inspect", str(path), "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert document["formats"] == {"chat": 2, "sharegpt": 1, "unknown": 1}
    assert [(fault["line"], fault["fatal"]) for fault in document["faults"]] == [(2, False), (3, True), (4, True)]
    shown = CliRunner().invoke(data_app, ["inspect", str(path)]).stdout
    assert "rows.jsonl:3 messages[0]: an assistant message must answer" in shown


def test_a_good_file_is_inspected_with_exit_code_0(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One paragraph of text.\n\nAnother paragraph.\n")
    result = CliRunner().invoke(data_app, ["inspect", str(path)])
    assert result.exit_code == 0
    assert "text: 1 rows" in result.stdout
