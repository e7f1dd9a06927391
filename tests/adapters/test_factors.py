"""Factor pairs: sums are exact, cuts are the nearest of their rank, and what is written does what was computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import read_base
from adapters.errors import MergeError
from adapters.factors import Factors, add_up, cut, read_factors, write_factors
from adapters.peft_format import load_config, lora_config
from adapters.validation import EngineLimits, validate_adapter
from tests.factories import make_adapter, make_base


def random_factors(rank: int, rows: int = 24, columns: int = 16, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(
        rng.normal(0, 0.3, (rank, columns)).astype(np.float32), rng.normal(0, 0.3, (rows, rank)).astype(np.float32)
    )


def delta(factors: Factors) -> np.ndarray[Any, Any]:
    return factors.b.astype(np.float64) @ factors.a.astype(np.float64)


@given(
    weights=st.lists(st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3), min_size=1, max_size=4),
    ranks=st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_a_sum_of_updates_is_their_weighted_sum_exactly(weights: list[float], ranks: list[int]) -> None:
    parts = [(weight, random_factors(rank, seed=rank)) for weight, rank in zip(weights, ranks, strict=False)]
    summed = add_up(parts)
    assert summed.rank == sum(factors.rank for _, factors in parts)
    assert np.allclose(delta(summed), sum(weight * delta(factors) for weight, factors in parts), atol=1e-4)


@given(rank=st.integers(1, 20), wanted=st.integers(1, 20), seed=st.integers(0, 50))
def test_a_cut_is_the_nearest_update_of_its_rank_and_states_its_error(rank: int, wanted: int, seed: int) -> None:
    factors = random_factors(rank, seed=seed)
    nearest, error = cut(factors, wanted)
    exact = delta(factors)
    values = np.linalg.svd(exact, compute_uv=False)
    best = np.sqrt(np.sum(values[wanted:] ** 2)) / np.linalg.norm(exact)
    assert nearest.rank <= min(rank, wanted)
    assert error == pytest.approx(best, abs=1e-6)
    assert np.linalg.norm(delta(nearest) - exact) / np.linalg.norm(exact) == pytest.approx(best, abs=1e-5)


def test_an_update_of_zero_is_cut_without_error() -> None:
    nothing = Factors(np.zeros((4, 8), np.float32), np.zeros((8, 4), np.float32))
    assert cut(nothing, 2)[1] == 0.0


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"k_proj": 2.0}}], ids=["lora", "rslora", "patterns"]
)
def test_what_is_written_is_an_adapter_with_the_same_updates_at_scale_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base")
    factors = read_factors(make_adapter(tmp_path / "a", base, scale=0.1, **options))
    (tmp_path / "b").mkdir()
    write_factors(tmp_path / "b", factors, read_base(base))
    assert validate_adapter(tmp_path / "b", read_base(base), EngineLimits(16)).alpha == 4
    for module, again in read_factors(tmp_path / "b").items():
        assert np.allclose(delta(again), delta(factors[module]), atol=np.abs(delta(factors[module])).max() * 2**-6)


def test_layers_of_several_ranks_and_of_some_blocks_only_are_named_one_by_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    info = read_base(base)
    modules = [name for name in info.modules if name.endswith("q_proj") or name == "model.layers.1.mlp.up_proj"]
    factors = {
        name: random_factors(8 if "mlp" in name else 4, info.modules[name].out_features, info.modules[name].in_features)
        for name in modules
    }
    write_factors(tmp_path, factors, info)
    config = lora_config(load_config(tmp_path))
    assert (config.rank, config.rank_of("model.layers.1.mlp.up_proj")) == (4, 8)
    assert {config.scale_of(name) for name in modules} == {1.0}
    assert "model.layers.1.mlp.up_proj" in config.target_modules
    assert validate_adapter(tmp_path, info, EngineLimits(16)).rank == 8


def test_a_dora_has_no_low_rank_update_to_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(MergeError, match="only LoRA and rsLoRA"):
        read_factors(make_adapter(tmp_path / "a", base, use_dora=True))
