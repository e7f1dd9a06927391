"""The advisor's rules of thumb."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.advise import Advice, Approach, TaskFacts, advise


def approaches(**facts: object) -> list[Approach]:
    return advise(TaskFacts.model_validate(facts)).approaches


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"examples": 50, "gap": "behaviour", "strict_format": True}, ["prompting"]),
        ({"examples": 500, "gap": "behaviour", "strict_format": True}, ["prompting", "fine-tuning"]),
        ({"examples": 5000, "gap": "behaviour", "strict_format": True}, ["fine-tuning"]),
        ({"examples": 5000, "latency_ms": 300, "cost_matters": True}, ["fine-tuning"]),
        ({"examples": 5000, "strict_format": True}, ["prompting"]),
        ({"examples": 5000, "gap": "behaviour", "strict_format": True, "few_shot_works": True}, ["prompting"]),
        ({"examples": 5000, "gap": "knowledge"}, ["rag", "prompting"]),
        ({"examples": 5000, "facts_change": "daily"}, ["rag", "prompting"]),
        ({"examples": 5000, "gap": "both", "strict_format": True}, ["rag", "fine-tuning"]),
        ({}, ["prompting"]),
    ],
)
def test_the_rules_of_thumb(facts: dict[str, object], expected: list[Approach]) -> None:
    assert approaches(**facts) == expected


FACTS = st.builds(
    TaskFacts,
    examples=st.integers(0, 10_000),
    gap=st.sampled_from(["knowledge", "behaviour", "both", "none"]),
    facts_change=st.sampled_from(["never", "yearly", "monthly", "daily"]),
    strict_format=st.booleans(),
    latency_ms=st.none() | st.integers(1, 5000),
    cost_matters=st.booleans(),
    few_shot_works=st.sampled_from([None, True, False]),
)


@given(FACTS)
def test_every_answer_has_reasons_and_a_way_on(facts: TaskFacts) -> None:
    advice: Advice = advise(facts)
    assert advice.approaches
    assert advice.reasons
    assert advice.would_change
    assert advice.next_command


@given(FACTS)
def test_new_or_changing_facts_never_go_into_weights_alone(facts: TaskFacts) -> None:
    if facts.gap in ("knowledge", "both") or facts.facts_change in ("monthly", "daily"):
        assert "rag" in advise(facts).approaches


@given(FACTS)
def test_weights_need_a_hundred_examples(facts: TaskFacts) -> None:
    if facts.examples < 100:
        assert "fine-tuning" not in advise(facts).approaches
