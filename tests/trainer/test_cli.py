"""The commands: what they print, and that asking for help costs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.advise import advise_app
from trainer.cli.data import data_app
from trainer.cli.estimate import estimate_app
from trainer.cli.evaluate import eval_app
from trainer.cli.train import train_app
from trainer.data.chat import write_rows
from trainer.data.sources import chat_row
from trainer.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path / "home"))


def test_the_commands_load_without_torch() -> None:
    code = """
import importlib, pkgutil, sys, trainer.cli
for module in pkgutil.iter_modules(trainer.cli.__path__):
    importlib.import_module(f"trainer.cli.{module.name}")
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "trl")))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_advise_answers_in_json() -> None:
    arguments = ["--examples", "2000", "--gap", "behaviour", "--strict-format", "--json"]
    result = CliRunner().invoke(advise_app, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["approaches"] == ["fine-tuning"]


def test_flags_are_laid_over_a_file(tmp_path: Path) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text("examples: 20\ngap: behaviour\nstrict_format: true\n")
    result = CliRunner().invoke(advise_app, [str(facts)], catch_exceptions=False)
    assert result.stdout.startswith("prompting")
    result = CliRunner().invoke(advise_app, [str(facts), "--examples", "3000"], catch_exceptions=False)
    assert result.stdout.startswith("fine-tuning")


def test_a_fact_nobody_knows_is_an_error() -> None:
    with pytest.raises(ConfigError, match="gap"):
        CliRunner().invoke(advise_app, ["--gap", "taste"], catch_exceptions=False)


@pytest.mark.slow
def test_estimate_counts_from_a_configuration_file(tiny_base: Path) -> None:
    arguments = ["reuters-topics", "--model-config", str(tiny_base / "config.json")]
    shown = CliRunner().invoke(estimate_app, arguments, catch_exceptions=False)
    assert "trained parameters" in shown.stdout
    document = json.loads(CliRunner().invoke(estimate_app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert [method["method"] for method in document["methods"]] == ["lora", "qlora", "full"]


def test_estimate_needs_no_prepared_base_where_its_shape_is_shipped() -> None:
    arguments = ["reuters-topics", "--set", "base=llama-3.1-8b-instruct", "--json"]
    document = json.loads(CliRunner().invoke(estimate_app, arguments, catch_exceptions=False).stdout)
    assert document["methods"][2]["trainable"] == 8_030_261_248
    assert "not fetched" in document["rows"][0]["source"]
    with pytest.raises(ConfigError, match="lorikeet base prepare"):
        CliRunner().invoke(estimate_app, ["reuters-topics", "--set", "base=acme/model"], catch_exceptions=False)


def test_estimate_counts_rows_of_ones_own_file_and_of_a_built_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [chat_row("s", "q " * 100, "a")] * 20)
    (tmp_path / "mine.yaml").write_text("{name: mine, data: {train: rows.jsonl}, max_tokens: 256}")
    arguments = [str(tmp_path / "mine.yaml"), "--json"]
    rows = json.loads(CliRunner().invoke(estimate_app, arguments, catch_exceptions=False).stdout)["rows"][0]
    assert rows["rows"] == 20
    assert 50 < rows["tokens_per_row"] <= rows["longest_row"] <= 256
    part = {"rows": 7, "sha256": "0" * 64, "tokens": 700}
    card = {"name": "built", "format": "chat", "seed": 0, "train": part, "eval": part, "sources": []}
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "dataset.json").write_text(json.dumps(card))
    arguments += ["--data", str(tmp_path / "built")]
    rows = json.loads(CliRunner().invoke(estimate_app, arguments, catch_exceptions=False).stdout)["rows"][0]
    assert (rows["rows"], rows["tokens_per_row"], rows["longest_row"]) == (7, 100, 256)


def test_known_data_sets_are_listed_with_their_terms() -> None:
    document = json.loads(CliRunner().invoke(data_app, ["list", "--json"], catch_exceptions=False).stdout)["data"]
    assert {entry["name"] for entry in document} >= {"reuters-r8", "finance-entities"}
    assert all(entry["licence"] and entry["fetched"] is False for entry in document)


def test_ones_own_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [chat_row("s", "q", "a")])
    assert "1 rows" in CliRunner().invoke(data_app, ["check", str(path)], catch_exceptions=False).stdout
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        CliRunner().invoke(data_app, ["check", str(path)], catch_exceptions=False)


def test_an_evaluation_without_a_key_says_where_one_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORIKEET_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="LORIKEET_API_KEY"):
        CliRunner().invoke(eval_app, ["reuters-topics", "--model", "x"], catch_exceptions=False)


def test_an_adapter_that_could_not_be_written_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["smoke", "--out", str(tmp_path / "file" / "adapter")]
    with pytest.raises(NotADirectoryError):
        CliRunner().invoke(train_app, arguments, catch_exceptions=False)


@pytest.mark.slow
def test_training_prints_where_the_adapter_is(tiny_base: Path, tmp_path: Path) -> None:
    arguments = ["smoke", "--set", f"base={tiny_base}", "--set", "precision=fp32", "--set", "max_tokens=512"]
    arguments += ["--set", "optimizer.max_steps=1", "--set", "lora.r=2", "--out", str(tmp_path / "adapter"), "--json"]
    result = CliRunner().invoke(train_app, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    assert Path(document["adapter"]) == tmp_path / "adapter"
    assert (tmp_path / "adapter" / "manifest.json").is_file()
    assert document["metrics"]["steps"] == 1
