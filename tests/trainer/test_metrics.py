"""Metrics: known answers, and the paired test against its definition."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import EvaluationError
from trainer.evaluation.metrics import Judged, classes, completeness, judge, mcnemar, per_field, summarise
from trainer.evaluation.text_scores import bertscore, rouge


def label(wanted: str, given: str, stopped: bool = True) -> Judged:
    return judge("classification", wanted, given, stopped=stopped, labels=["acq", "earn"])


def as_json(wanted: str, given: str) -> Judged:
    return judge("json", wanted, given, stopped=True, labels=[])


def test_a_label_may_differ_in_case_and_full_stop_only() -> None:
    assert label("earn", " Earn.\n").correct
    assert not label("earn", "earn acq").valid
    assert label("earn", "acq").valid
    assert not label("earn", "acq").correct


def test_classification_is_summed_up() -> None:
    judged = [label("earn", "earn"), label("earn", "acq"), label("acq", "acq"), label("acq", "nonsense", stopped=False)]
    metrics = summarise("classification", judged)
    assert metrics == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx((2 / 3 + 0.5) / 2),
        "valid_rate": 0.75,
        "stop_rate": 0.75,
    }


def test_json_is_compared_by_value_and_field() -> None:
    wanted = '{"person": ["Ann", "Bob"], "place": []}'
    same = as_json(wanted, '{"place":[],"person":["Ann","Bob"]}')
    half = as_json(wanted, '{"person": ["Ann"], "place": []}')
    other = as_json(wanted, '{"person": "Ann"}')
    prose = as_json(wanted, 'Here it is: {"person": []}')
    assert same.correct
    assert not half.correct
    assert not prose.valid
    metrics = summarise("json", [same, half, other, prose])
    assert metrics["valid_rate"] == 0.75
    assert metrics["schema_rate"] == 0.5
    assert metrics["exact_match"] == 0.25
    assert metrics["field_f1"] == pytest.approx(2 * 4 / (4 + 8))


def test_rows_without_any_value_count_as_found() -> None:
    assert summarise("json", [as_json('{"a": []}', '{"a": []}')])["field_f1"] == 1.0


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (0, 6, 0.03125), (1, 7, 0.0703125)])
def test_the_paired_p_has_its_known_values(lost: int, gained: int, p: float) -> None:
    first = [True] * lost + [False] * gained + [True] * 3
    second = [False] * lost + [True] * gained + [True] * 3
    assert mcnemar(first, second) == pytest.approx(p)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_the_paired_p_is_a_probability_and_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    p = mcnemar(first, second)
    assert 0 <= p <= 1
    assert math.isclose(p, mcnemar(second, first))


@given(st.text(), st.text())
def test_no_answer_breaks_a_judge(wanted: str, given: str) -> None:
    for task in ("classification", "json"):
        metrics = summarise(task, [judge(task, wanted, given, stopped=True, labels=[wanted])])
        assert all(0 <= value <= 1 for value in metrics.values())


def test_a_schema_decides_where_there_is_one() -> None:
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"type": "array"}},
        "additionalProperties": False,
    }
    ours = judge("json", '{"a": [], "b": 1}', '{"a": []}', stopped=True, schema=schema)
    assert (ours.scores["schema_rate"], ours.scores["completeness"]) == (1.0, 0.5)
    assert judge("json", '{"a": []}', '{"a": 1}', stopped=True, schema=schema).scores["schema_rate"] == 0.0
    assert judge("json", '{"a": []}', "prose", stopped=True, schema=schema).scores["schema_rate"] == 0.0


def test_a_field_that_is_there_but_empty_is_not_complete() -> None:
    assert completeness({"a": "x", "b": [], "c": [1]}, {"a": "", "b": [], "c": [2]}) == pytest.approx(2 / 3)


def test_each_label_has_its_figures_and_other_answers_a_column() -> None:
    rows = [label("a", "a"), label("a", "b"), label("b", "nonsense"), label("b", "B.")]
    found = classes(rows, ["a", "b"])
    assert found.confusion == ((1, 1, 0), (0, 1, 1))
    assert found.recall == (0.5, 0.5)
    assert found.precision == (1.0, 0.5)
    assert summarise("classification", rows)["macro_f1"] == pytest.approx(sum(found.f1) / 2)


def test_each_field_has_its_figures() -> None:
    rows = [judge("json", '{"a": [1, 2], "b": "x"}', '{"a": [1, 3], "b": "x"}', stopped=True)]
    found = per_field(rows)
    assert found["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "wanted": 2}
    assert found["b"]["f1"] == 1.0


def test_a_text_is_compared_by_its_words() -> None:
    same, half, other = rouge(["the cat sat"] * 3, ["the cat sat", "the cat", "dogs"])
    assert same["rouge_l"] == 1.0
    assert half["rouge_l"] == pytest.approx(0.8)
    assert other["rouge_l"] == 0.0
    judged = judge("text", "the cat sat", "The  cat sat", stopped=True, scores=same)
    assert list(summarise("text", [judged])) == [
        "rouge_l",
        "rouge_1",
        "rouge_2",
        "exact_match",
        "valid_rate",
        "stop_rate",
    ]


def test_a_program_decides_by_its_tests() -> None:
    judged = [judge("code", "assert 1", "pass", stopped=True, scores={"pass_at_1": value}) for value in (1.0, 0.0)]
    assert summarise("code", judged) == {"pass_at_1": 0.5, "valid_rate": 1.0, "stop_rate": 1.0}


def test_bertscore_without_its_model_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(EvaluationError, match="bertscore"):
        bertscore(["a"], ["b"], model="x", layers=None)


@pytest.mark.slow
def test_bertscore_compares_by_an_encoder_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("bert_score", reason="an extra")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat a dog ran".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(tmp_path)
    same, other = bertscore(["the cat sat"] * 2, ["the cat sat", "a dog ran"], model=str(tmp_path), layers=2)
    assert same == pytest.approx(1.0)
    assert other < same
    with pytest.raises(EvaluationError, match="bertscore_layers"):
        bertscore(["a"], ["b"], model=str(tmp_path), layers=None)


def test_an_encoder_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(ModuleType):
        @staticmethod
        def BERTScorer(**_: object) -> None:  # noqa: N802
            raise OSError("cannot be fetched")

    monkeypatch.setitem(sys.modules, "bert_score", Absent("bert_score"))
    with pytest.raises(EvaluationError, match="roberta-large is not on this machine"):
        bertscore(["a"], ["b"], model="roberta-large", layers=None)
