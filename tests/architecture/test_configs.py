"""Every file in configs/ loads with the loader of the room it belongs to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.base import load_spec
from adapters.promotion import load_policy
from gateway.engines.profile import load_profile
from gateway.settings import Settings
from loadtests.scenario import load_scenario
from tests.architecture.observability import load_rules, load_scrapes
from trainer.config import load_config, load_train_config
from trainer.data.catalog import load_dataset_spec
from trainer.data.recipe import BuildConfig
from trainer.estimate import load_gpus
from trainer.evaluation.approaches import Comparison
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.probes import ProbeConfig
from trainer.recipe import load_recipes

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.y*ml"))


def load_settings(path: Path) -> Settings:
    """The file's fields are all settings: a misspelt one would silently be ignored."""
    unknown = set(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) - set(Settings.model_fields)
    assert not unknown, f"{path} sets what is no setting: {sorted(unknown)}"
    return Settings()


def load_data_spec(path: Path) -> Any:
    return load_dataset_spec(path.stem)


def load_eval_config(path: Path) -> EvalConfig:
    return load_config(path, EvalConfig)


def load_probe_config(path: Path) -> ProbeConfig:
    return load_config(path, ProbeConfig)


def load_comparison(path: Path) -> Comparison:
    return load_config(path, Comparison)


def load_build_config(path: Path) -> BuildConfig:
    return load_config(path, BuildConfig)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "configs/gateway.yaml": load_settings,
    "configs/bases": load_spec,
    "configs/data": load_data_spec,
    "configs/datasets": load_build_config,
    "configs/engines": load_profile,
    "configs/promotion.yaml": load_policy,
    "configs/jobs.yaml": load_recipes,
    "configs/eval": load_eval_config,
    "configs/eval/probes": load_probe_config,
    "configs/eval/approaches": load_comparison,
    "configs/loadtests": load_scenario,
    "configs/gpus.yaml": load_gpus,
    "configs/observability/alerts.yaml": load_rules,
    "configs/observability/prometheus.yml": load_scrapes,
    "configs/train": load_train_config,
}


def loader_of(path: Path) -> Callable[[Path], Any] | None:
    return LOADERS.get(path.as_posix()) or LOADERS.get(path.parent.as_posix())


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_configuration_file_loads_with_its_owners_loader(path: Path) -> None:
    loader = loader_of(path)
    assert loader is not None, f"nobody is known to read {path}: add its folder to LOADERS"
    assert loader(ROOT / path) is not None
