"""The advisor's rules of thumb."""

import io
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trainer.advise import Advice, Approach, TaskFacts, advise
from trainer.cli.advise import ask_facts


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


def test_questions_on_the_terminal_give_the_facts() -> None:
    shown = io.StringIO()
    answers = io.StringIO("no\n2000\nbehaviour\nnever\ny\nn\n300\n")
    found = ask_facts(Console(file=shown), answers)
    assert found == {
        "few_shot_works": False,
        "examples": 2000,
        "gap": "behaviour",
        "facts_change": "never",
        "strict_format": True,
        "cost_matters": False,
        "latency_ms": 300,
    }
    assert approaches(**found) == ["fine-tuning"]
    assert approaches(**ask_facts(Console(file=shown), io.StringIO("\n" * 7))) == ["prompting"]


@pytest.mark.slow
def test_the_command_asks_where_nothing_is_given_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorikeet", "advise"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.write(ours, b"no\n2000\nbehaviour\nnever\ny\nn\n0\n")
    answered, _ = process.communicate(timeout=60)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0
    assert answered.startswith("fine-tuning")


def test_without_a_terminal_and_without_facts_it_says_what_to_give() -> None:
    command = [sys.executable, "-m", "lorikeet", "advise"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--data" in done.stderr
