"""Quantizing: only what can be is begun, the result is held against its source, and nothing is left when it is not like it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import quantize
from adapters.base import BaseModelInfo, ModuleInfo, read_base
from adapters.environments import Environment, Step, Tool
from adapters.errors import ParityError, QuantizeError
from adapters.ladder import Divergence, Rung, TaskScore, read_rungs
from adapters.quantize import GROUPS, SCHEMES, _layer, choose_group, quantize_checkpoint, read_unquantized
from adapters.task import Task
from tests.adapters.test_compressed import make_quantized
from tests.factories import make_base

Report = Callable[[str, int, int], None]


class Rounding(Environment):
    """Stands in for llm-compressor's environment: rounds the tiny base's weights to nearest; noise makes a bad job of it."""

    def run(
        self,
        script: str,
        arguments: Sequence[str],
        report: Report = lambda *step: None,
        *,
        step_of: Callable[[str], Step | None] | None = None,
    ) -> None:
        asked = json.loads(arguments[0])
        report("quantizing", 0, 1)
        inputs = (
            {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True} if asked["scheme"] == "W8A8" else None
        )
        stored = "int-quantized" if inputs else "pack-quantized"
        make_quantized(Path(asked["out"]), stored, 1, inputs)


class Silent:
    """A tokenizer whose every text is empty."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return ""


def stand_in(tmp_path: Path) -> Environment:
    return Rounding(Tool("llmcompressor"), tmp_path)


def info_of(folder: Path, inputs: Sequence[int]) -> BaseModelInfo:
    modules = {f"layers.{i}": ModuleInfo(out_features=8, in_features=size, norm=1) for i, size in enumerate(inputs)}
    return read_base(folder).model_copy(update={"modules": modules})


@given(inputs=st.lists(st.integers(1, 64).map(lambda size: size * 16), min_size=1, max_size=5))
def test_the_group_is_the_largest_that_all_inputs_divide_by(
    inputs: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / "group-base"
    group = choose_group(info_of(base if base.is_dir() else make_base(base), inputs))
    assert all(size % (group or 1) == 0 for size in inputs)
    assert not any(all(size % larger == 0 for size in inputs) for larger in GROUPS if larger > group)


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(QuantizeError, match="exists already"):
        quantize_checkpoint(base, base, SCHEMES["w8a8"], stand_in(tmp_path))


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="quantized already"):
        read_unquantized(make_quantized(tmp_path / "q", "int-quantized"))


def test_four_bits_are_not_begun_without_rows(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(QuantizeError, match="--data"):
        quantize_checkpoint(base, tmp_path / "out", SCHEMES["w4a16"], stand_in(tmp_path))


def test_progress_counts_layers() -> None:
    assert _layer("(3/31): Calibrating:  50%|##") == ("layer by layer: calibrating", 2, 31)
    assert _layer("Compressing model:  43%|####") == ("Compressing model", 43, 100)


@pytest.mark.slow
def test_a_quantized_checkpoint_is_a_base_with_one_rung_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    other = Rung(name="gguf q8_0", dtype="q8_0", by="llama.cpp", sample=Divergence(0.0, 0.0, 1.0))
    (base / "merge-report.json").write_text(
        json.dumps({"adapter_digest": "12", "rungs": [other.model_dump(mode="json")]})
    )
    task = Task("rows", ((1, 2), (3, 4)), ("", "never this"))
    monkeypatch.setattr(quantize, "load_tokenizer", lambda checkpoint: Silent())
    result = quantize_checkpoint(base, tmp_path / "out", SCHEMES["w8a8"], stand_in(tmp_path), task=task)
    (rung,) = read_rungs(tmp_path / "out")
    assert rung.name == "quantized w8a8"
    assert rung.sample is not None
    assert 0 < rung.sample.mean_abs < 0.1
    assert rung.sample.stop_rate is not None
    assert rung.task == TaskScore(source="rows", rows=2, before=0.5, after=0.5)
    assert json.loads((tmp_path / "out" / "merge-report.json").read_text())["adapter_digest"] == "12"
    described, source = read_base(tmp_path / "out"), read_base(base)
    assert described.modules.keys() == source.modules.keys()
    assert described.name == "Tiny-Llama-w8a8"
    assert described.fingerprint.weights_digest != source.fingerprint.weights_digest
    assert result.size_bytes < result.source_bytes
    assert not list(tmp_path.glob(".out-*"))


@pytest.mark.slow
def test_what_is_outside_the_limits_is_not_kept_unless_a_reason_is_given(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    strict = {"limits": SCHEMES["int8-weight-only"].limits.model_copy(update={"kl": 1e-9})}
    scheme = type(SCHEMES["int8-weight-only"])(**{**SCHEMES["int8-weight-only"].__dict__, **strict})
    with pytest.raises(ParityError, match=r"KL is .* --data FOLDER.* --accept"):
        quantize_checkpoint(base, tmp_path / "out", scheme, stand_in(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    result = quantize_checkpoint(base, tmp_path / "out", scheme, stand_in(tmp_path), accept="a toy")
    assert result.rung.faults
    assert read_rungs(tmp_path / "out")[0].accepted == "a toy"


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")

    def interrupt(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(base, tmp_path / "out", SCHEMES["w8a8"], stand_in(tmp_path), report=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.slow
def test_the_rung_sees_rounded_activations(tmp_path: Path) -> None:
    """The same 8-bit weights, with and without: only then is the difference the engine's."""
    from adapters.compressed import read_scheme
    from adapters.parity import questions_for
    from adapters.quantize import measure_rung

    base = make_base(tmp_path / "base")
    rounded = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    figures = []
    for name, inputs in (("plain", None), ("rounded", rounded)):
        made = make_quantized(tmp_path / name, "int-quantized", 1, inputs)
        assert (read_scheme(made).activations is None) is (inputs is None)
        (scratch := tmp_path / f"{name}-scratch").mkdir()
        questions = questions_for(base, read_base(base), ())
        rung = measure_rung(base, made, SCHEMES["w8a8"], questions, scratch, lambda *step: None)
        assert rung.sample is not None
        figures.append(rung.sample.mean_abs)
    assert figures[1] > figures[0] * 1.05
    assert np.isfinite(figures).all()
