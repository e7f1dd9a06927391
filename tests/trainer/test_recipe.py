"""What a job of the API is trained with: `auto` settled, numbers kept, and a configuration that holds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.recipe import CHECKPOINTS, Hyperparameters, Recipe, load_recipe, load_recipes, run_config, settle

SPEC = {"method": "supervised", "adapter": "topics", "seed": 7}


def config(chosen: Hyperparameters, recipe: Recipe = Recipe(), **changes: Any) -> TrainConfig:  # noqa: B008
    options: dict[str, Any] = {"base": "tiny", "eval_file": False, "further": False, **changes}
    spec = {**SPEC, "method": options.pop("method", "supervised")}
    return run_config(spec, recipe, chosen, **options)


@given(rows=st.integers(1, 10**6))
def test_auto_stays_within_what_the_size_of_the_file_says(rows: int) -> None:
    chosen = settle({}, Recipe(), method="supervised", rows=rows)
    assert 1 <= chosen.n_epochs <= 3
    assert 1 <= chosen.batch_size <= max(1, rows)
    assert chosen.learning_rate_multiplier == 1.0
    assert chosen.beta is None
    more = settle({}, Recipe(), method="supervised", rows=rows + 1)
    assert more.n_epochs <= chosen.n_epochs
    assert more.batch_size >= chosen.batch_size


@given(epochs=st.integers(1, 50), batch=st.integers(1, 256), multiplier=st.floats(0.01, 100))
def test_what_was_asked_for_is_what_is_trained(epochs: int, batch: int, multiplier: float) -> None:
    asked = {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": multiplier}
    chosen = settle(asked, Recipe(), method="supervised", rows=100)
    optimizer = config(chosen).optimizer
    assert (chosen.n_epochs, chosen.batch_size) == (epochs, batch)
    assert optimizer.epochs == epochs
    assert optimizer.batch_rows * optimizer.accumulate == batch
    assert optimizer.batch_rows <= Recipe().batch_rows
    assert optimizer.learning_rate == pytest.approx(multiplier * Recipe().learning_rate)
    assert CHECKPOINTS[0] <= optimizer.evaluations <= CHECKPOINTS[1]


def test_preferences_have_a_beta_and_a_rate_of_their_own() -> None:
    chosen = settle({"beta": 0.3}, Recipe(), method="dpo", rows=100)
    made = config(chosen, method="dpo", further=True, eval_file=True)
    assert (made.method, made.beta, str(made.adapter)) == ("dpo", 0.3, "further")
    assert made.optimizer.learning_rate == Recipe().dpo_learning_rate
    assert made.data is not None
    assert str(made.data.eval) == "eval.jsonl"
    assert settle({}, Recipe(), method="dpo", rows=100).beta == Recipe().beta


def test_a_configuration_survives_being_written_down() -> None:
    made = config(settle({}, Recipe(), method="supervised", rows=100))
    assert TrainConfig.model_validate_json(made.model_dump_json()) == made


def test_a_base_has_its_own_recipe_and_others_the_default(tmp_path: Any) -> None:
    assert load_recipe("llama-3.1-8b-instruct").lora.r == 16
    assert load_recipe("nobody-knows-it") == load_recipe("smollm2-135m-instruct")
    (tmp_path / "jobs.yaml").write_text("default: {learning: 1}\nbases: {}\n")
    with pytest.raises(ConfigError, match="learning"):
        load_recipes(tmp_path / "jobs.yaml")
