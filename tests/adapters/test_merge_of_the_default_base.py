"""The default base, prepared from its package, with an adapter folded in."""

import json
from pathlib import Path

import pytest

from adapters.base import read_base
from adapters.merge import merge_adapter
from adapters.validation import EngineLimits, validate_adapter
from tests.factories import make_adapter


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_merged_into_the_default_base_keeps_its_answers(base_model: Path, tmp_path: Path) -> None:
    info = read_base(base_model)
    assert (info.licence, len(info.modules), info.tied_embeddings) == ("Apache-2.0", 210, True)
    adapter = make_adapter(tmp_path / "adapter", base_model, rank=8, alpha=16)
    assert validate_adapter(adapter, info, EngineLimits(16)).norm_ratio == pytest.approx(0.1, rel=0.2)
    report = merge_adapter(base_model, adapter, tmp_path / "out")
    print(json.dumps(report.as_dict(), indent=1))  # noqa: T201 - the measurement, shown with pytest -s
    assert report.prompts == "default prompts"
    assert report.fp32 is not None
    assert report.saved is not None
    assert report.effect is not None
    assert report.fp32.max_abs < 1e-3
    assert report.fp32.top1 == 1.0
    assert report.effect.mean_abs > 3 * report.saved.mean_abs
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base_model / "tokenizer.json").read_bytes()
