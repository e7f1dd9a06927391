"""Training configurations: files, overrides, and what is said about a bad one."""

from pathlib import Path

import pytest

from trainer.config import CONFIGS, TrainConfig, find_config, load_config, load_train_config, with_override
from trainer.errors import ConfigError
from trainer.evaluation.config import EvalConfig


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_training_configuration_is_valid(path: Path) -> None:
    assert load_config(path, TrainConfig).name == path.stem


@pytest.mark.parametrize("path", sorted((CONFIGS / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_evaluation_is_valid(path: Path) -> None:
    assert load_config(path, EvalConfig).name == path.stem


def test_a_configuration_is_found_by_its_shipped_name() -> None:
    assert find_config("smoke", "train") == CONFIGS / "train" / "smoke.yaml"


def test_an_unknown_configuration_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="reuters-topics"):
        find_config("nothing", "train")


def test_an_override_reaches_a_nested_setting() -> None:
    config, _ = load_train_config("smoke", ["optimizer.max_steps=7", "name=other"])
    assert config.optimizer.max_steps == 7
    assert config.name == "other"
    assert config.optimizer.batch_rows == 2


@pytest.mark.parametrize("sentence", ["Yes: it is.", "The sky is blue.", "blue # not a comment"])
def test_a_sentence_stays_a_sentence(sentence: str) -> None:
    changed = with_override({"answer": "x"}, f"answer={sentence}")
    assert isinstance(changed["answer"], str)
    assert changed["answer"].startswith(sentence.split(" #")[0])


def test_an_override_leaves_the_original_alone() -> None:
    raw = {"optimizer": {"epochs": 1}}
    with_override(raw, "optimizer.epochs=2")
    assert raw == {"optimizer": {"epochs": 1}}


@pytest.mark.parametrize("text", ["epochs", "=3", "a..b=1"])
def test_an_override_without_key_and_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        with_override({}, text)


def test_a_bad_file_names_every_bad_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nanswer: y\nlora: {r: 0}\ncolour: red\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, TrainConfig)
    assert "lora.r" in str(caught.value)
    assert "colour" in str(caught.value)


def test_data_and_answer_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("name: x\nanswer: y\ndata: {dataset: reuters-r8}\n")
    with pytest.raises(ConfigError, match="either"):
        load_config(path, TrainConfig)


def test_stages_inherit_what_they_do_not_say(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(
        "name: x\nmax_tokens: 64\noptimizer: {epochs: 3}\nstages:\n"
        "  - {method: pretrain, data: {train: texts.jsonl}}\n"
        "  - {answer: y, optimizer: {epochs: 2}}\n"
    )
    config = load_config(path, TrainConfig)
    assert [stage.method for stage in config.courses] == ["pretrain", "sft"]
    assert [stage.optimizer.epochs for stage in config.courses] == [3, 2]
    assert [stage.max_tokens for stage in config.courses] == [64, 64]
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stages: [{answer: y}]\nanswer: z", "belong into each stage"),
        ("stages: [{answer: y}, {method: dpo}]", "in stage 2"),
        ("method: dpo\nanswer: y", "learned by method sft"),
        ("method: dpo\ndata: {dataset: reuters-r8}", "holds chat rows"),
        ("method: dpo\npacking: true\ndata: {train: x.jsonl}", "cannot be packed"),
        ("answer: y\ntuning: full\nadapter: there", "merge it first"),
        ("answer: y\nlora: {dora: true}\nprofile: servable", "no engine can share"),
        ("answer: y\nlora: {rank_pattern: {q_proj: 0}}", "rank_pattern"),
        ("data: {dataset: reuters-r8, folder: there}", "exactly one of"),
        ("answer: y\nlora: {target_modules: [q_proj, lm_head]}", "no layers for LoRA"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: x\n{text}\n")
    with pytest.raises(ConfigError, match=reason):
        load_config(path, TrainConfig)


def test_what_no_engine_can_share_is_merge_only() -> None:
    def profile(**settings: object) -> str:
        return TrainConfig.model_validate({"name": "x", "answer": "y", **settings}).intrinsic_profile

    assert profile() == profile(lora={"rslora": True}) == profile(tuning="qlora") == "servable"
    assert profile(tuning="full") == profile(lora={"dora": True}) == "merge-only"
