"""The verdict before training: what an engine could not share is refused, or told to be merged."""

from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModelInfo, ModuleInfo
from adapters.manifest import BaseFingerprint
from adapters.validation import SERVED_MODULES, EngineLimits
from trainer.config import TrainConfig
from trainer.errors import ConfigError, TrainingError
from trainer.servability import Servability, ServingEngine, judge_plan, load_engine

MLP = ("gate_proj", "up_proj", "down_proj")
BLOCK = {name: f"model.layers.0.{'mlp' if name in MLP else 'self_attn'}.{name}" for name in SERVED_MODULES}
ENGINE = ServingEngine("cpu", EngineLimits(16, frozenset(SERVED_MODULES)))


@pytest.fixture
def base() -> BaseModelInfo:
    module = ModuleInfo(out_features=8, in_features=8, norm=1)
    return BaseModelInfo(
        name="tiny",
        slug="tiny",
        source="folder:x",
        licence="MIT",
        fingerprint=BaseFingerprint(model="tiny", weights_digest="0", template_digest="0"),
        chat_template="",
        modules=dict.fromkeys((*BLOCK.values(), "model.embed_tokens", "lm_head"), module),
        tied_embeddings=True,
        vocab_size=9,
        context_tokens=64,
    )


def judge(base: BaseModelInfo, engine: ServingEngine = ENGINE, **settings: Any) -> Servability:
    config = TrainConfig.model_validate({"name": "x", "answer": "y", **settings})
    return judge_plan(config, config.lora, base, engine)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tuning": "qlora"},
        {"lora": {"r": 16, "rslora": True}},
        {"lora": {"rank_pattern": {"down_proj": 16}, "target_modules": ["q_proj", "down_proj"]}},
    ],
)
def test_plain_adapters_are_servable(base: BaseModelInfo, settings: dict[str, Any]) -> None:
    assert judge(base, **settings) == Servability("servable", "cpu")


@pytest.mark.parametrize(
    ("settings", "reason"), [({"tuning": "full"}, "Every weight"), ({"lora": {"dora": True}}, "DoRA")]
)
def test_what_no_engine_shares_is_told_to_be_merged(base: BaseModelInfo, settings: dict[str, Any], reason: str) -> None:
    verdict = judge(base, **settings)
    assert verdict.profile == "merge-only"
    assert reason in verdict.line


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"r": 32}, "ranks up to 16"),
        ({"rank_pattern": {"q_proj": 64}}, "ranks up to 16"),
        ({"target_modules": ["q_proj", "up_proj"]}, "up_proj is to be trained"),
    ],
)
def test_what_this_engine_cannot_share_is_refused_unless_it_is_to_be_merged(
    base: BaseModelInfo, lora: dict[str, Any], reason: str
) -> None:
    narrow = ServingEngine("narrow", EngineLimits(16, frozenset({"q_proj", "v_proj"})))
    lora = {"target_modules": ["q_proj"]} | lora
    with pytest.raises(TrainingError, match=reason) as caught:
        judge(base, narrow, lora=lora)
    assert "profile: merge-only" in str(caught.value)
    assert judge(base, narrow, lora=lora, profile="merge-only").profile == "merge-only"
    with pytest.raises(TrainingError, match=reason):
        judge(base, narrow, lora=lora, profile="servable")


def test_a_layer_the_base_does_not_have_is_refused_whatever_is_to_become_of_it(base: BaseModelInfo) -> None:
    with pytest.raises(TrainingError, match="Did you mean q_proj"):
        judge(base, lora={"target_modules": ["q_prj"]}, profile="merge-only")


def test_a_regular_expression_in_a_rank_pattern_is_refused(base: BaseModelInfo) -> None:
    with pytest.raises(TrainingError, match="no regular expressions"):
        judge(base, lora={"rank_pattern": {"(a+)+": 8}})


def test_the_engine_is_a_profile_or_what_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_engine("gpu-80gb").limits.max_rank == 64
    monkeypatch.setenv("LORIKEET_ENGINE", "gpu-24gb")
    assert load_engine("auto").name == "gpu-24gb"
    (tmp_path / "mine.yaml").write_text("max_rank: 8\ntarget_modules: [q_proj]\n")
    assert load_engine(str(tmp_path / "mine.yaml")) == ServingEngine("mine", EngineLimits(8, frozenset({"q_proj"})))
    with pytest.raises(ConfigError, match="Known: cpu"):
        load_engine("nothing")
