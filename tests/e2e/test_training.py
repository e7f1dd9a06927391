"""Training on the real base: a few steps, exported, and the answer really changes."""

from pathlib import Path

import pytest

from adapters.base import read_base
from adapters.home import home
from adapters.validation import EngineLimits, validate_adapter
from trainer.config import load_train_config
from trainer.run import new_run_folder, run_training


@pytest.mark.e2e
@pytest.mark.slow
def test_a_smoke_run_on_the_default_base_gives_a_servable_adapter(base_model: Path, tmp_path: Path) -> None:
    config, path = load_train_config("smoke", [f"base={base_model}"])
    run = tmp_path / "run"
    finished = run_training(config, home(), run, relative_to=path.parent)
    report = validate_adapter(finished.adapter, read_base(base_model), EngineLimits(max_rank=16))
    assert (report.rank, finished.manifest.metrics["steps"]) == (8, 3)
    assert finished.seconds < 120
    for golden in finished.manifest.goldens:
        assert golden.logprobs != pytest.approx(golden.base_logprobs, abs=1e-3)
    assert new_run_folder(home(), config.name, 0).name.startswith("smoke-")
