"""The parity ladder: rungs are kept in their order, and what is outside its limits is not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import MergeError, ParityError
from adapters.ladder import Divergence, Limits, Rung, add_rung, judge_rung, read_rungs


def figures(
    max_abs: float = 1e-5,
    mean_abs: float = 1e-6,
    top1: float = 1.0,
    *,
    kl: float | None = 1e-9,
    stop_rate: float | None = 0.75,
    prompts: int = 8,
) -> Divergence:
    return Divergence(
        max_abs, mean_abs, top1, kl=kl, tokens=100, prompts=prompts, stop_rate=stop_rate, reference_stop_rate=0.75
    )


def rung(name: str = "quantized", limits: Limits | None = None, accepted: str = "", **changed: float) -> Rung:
    return Rung(
        name=name,
        dtype="w8a8",
        by="test",
        goldens=figures(**changed),  # type: ignore[arg-type]
        limits=limits or Limits(max_abs=0.5, mean_abs=0.1, top1=0.9, kl=0.01),
        accepted=accepted,
    )


def test_rungs_stand_in_the_ladders_order_however_they_are_added(tmp_path: Path) -> None:
    for name in ("gguf q8_0", "saved", "quantized", "merged", "gguf q8_0"):
        add_rung(tmp_path, rung(name))
    assert [each.name for each in read_rungs(tmp_path)] == ["merged", "saved", "quantized", "gguf q8_0"]


def test_a_rung_leaves_the_rest_of_report_and_card_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "merge-report.json").write_text('{"adapter_digest": "12", "rungs": []}')
    (tmp_path / "README.md").write_text("# support merged\n\n## Licences\n\n- base: MIT\n\n## Parity\n\nformer\n")
    add_rung(tmp_path, rung())
    assert json.loads((tmp_path / "merge-report.json").read_text())["adapter_digest"] == "12"
    card = (tmp_path / "README.md").read_text()
    assert "- base: MIT" in card
    assert "former" not in card
    assert "| quantized, w8a8 | goldens | 1.00e-05 |" in card
    assert "| 75% |" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "merge-report.json"]


@pytest.mark.parametrize(
    "changed",
    [
        {"max_abs": 0.6},
        {"mean_abs": 0.2},
        {"top1": 0.8},
        {"kl": 0.02},
        {"max_abs": float("nan")},
        {"mean_abs": float("nan")},
        {"kl": float("nan")},
        {"stop_rate": 0.5},
    ],
    ids=str,
)
def test_a_rung_outside_one_limit_is_refused_and_nothing_is_written(tmp_path: Path, changed: dict[str, float]) -> None:
    with pytest.raises(ParityError, match="goldens"):
        add_rung(tmp_path, rung(**changed))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_rung_that_was_accepted_is_kept_with_its_faults_and_the_reason(tmp_path: Path) -> None:
    add_rung(tmp_path, rung(accepted="a demonstration", kl=0.5, stop_rate=0.25))
    assert "| 25% (75%) |" in (tmp_path / "README.md").read_text()
    assert "KL is 0.5" in (tmp_path / "README.md").read_text()
    assert "accepted: a demonstration" in (tmp_path / "README.md").read_text()
    (kept,) = read_rungs(tmp_path)
    assert (kept.accepted, len(kept.faults)) == ("a demonstration", 2)


def test_a_rung_nothing_was_measured_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="Nothing was measured"):
        add_rung(tmp_path, Rung(name="gguf", dtype="f16", by="test"))


def test_a_report_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "merge-report.json").write_text('{"rungs": [{"name": "merged"}]}')
    with pytest.raises(MergeError, match=r"merge-report\.json"):
        add_rung(tmp_path, rung())


@given(lost=st.integers(0, 20), prompts=st.integers(1, 20))
def test_one_prompt_that_no_longer_ends_is_forgiven_and_more_than_the_share_are_not(lost: int, prompts: int) -> None:
    lost = min(lost, prompts)
    seen = Divergence(0, 0, 1, prompts=prompts, stop_rate=(prompts - lost) / prompts, reference_stop_rate=1.0)
    within = lost <= max(1, 0.1 * prompts)
    made = Rung(name="gguf", dtype="q4_0", by="test", sample=seen)
    if within:
        judge_rung(made)
    else:
        with pytest.raises(ParityError, match="end by themselves"):
            judge_rung(made)
