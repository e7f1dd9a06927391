"""The cheap rungs: rows chosen, prompts made, answers scored, and what the advisor makes of them, on a stand-in model."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trainer.advise import Advice, TaskFacts, advise
from trainer.cli.advise import advise_app
from trainer.data.chat import Row, answer_of
from trainer.data.sources import chat_row
from trainer.errors import ConfigError, DataError
from trainer.evaluation.client import Answer
from trainer.rungs import Example, Examples, Ladder, climb, kind_of, plan_ladder, prompts_for, read_examples

LABELS = ("acq", "earn", "ship")
Brain = Callable[[list[dict[str, str]]], str]


def topic(number: int) -> Row:
    return chat_row("Pick a topic.", f"story {number}", LABELS[number % 3])


def fact(number: int) -> dict[str, Any]:
    return {
        "prompt": f"Who leads office {number}?",
        "completion": f"Person {number * 7}",
        "context": f"Office {number} is led by Person {number * 7}.",
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def topics(path: Path, count: int) -> Path:
    return write(path, [{"messages": topic(number)} for number in range(count)])


async def climbed(path: Path, brain: Brain, *, rows: int = 40, shots: int = 6) -> Advice:
    examples = read_examples(path)
    ladder = plan_ladder(examples, rows=rows, shots=shots)

    async def ask(rung: str, prompts: list[Row], max_tokens: int) -> list[Answer]:
        return [Answer(brain(prompt), True, len(str(prompt)) // 4) for prompt in prompts]

    evidence = await climb(ladder, ask, model="base", data=str(path), distinct=examples.distinct)
    return advise(TaskFacts(), evidence)


async def test_a_model_that_learns_the_labels_from_examples_needs_no_training(tmp_path: Path) -> None:
    def brain(prompt: list[dict[str, str]]) -> str:
        right = LABELS[int(prompt[-1]["content"].split()[-1]) % 3]
        return right if len(prompt) > 2 else f"I think it is {right}."

    advice = await climbed(topics(tmp_path / "rows.jsonl", 3000), brain)
    assert advice.evidence is not None
    assert [(rung.name, rung.score, rung.valid) for rung in advice.evidence.rungs] == [
        ("plain", 0, 0),
        ("few-shot", 1, 1),
    ]
    assert advice.approaches == ["prompting"]
    assert advice.facts.examples == 3000
    assert "few" not in advice.next_command
    assert "100% (91% to 100%)" in advice.reasons[0]


async def test_a_model_that_never_keeps_the_form_is_to_be_tuned(tmp_path: Path) -> None:
    advice = await climbed(topics(tmp_path / "rows.jsonl", 1200), lambda prompt: "Let me think.")
    assert advice.facts.gap == "behaviour"
    assert advice.facts.strict_format
    assert advice.approaches == ["fine-tuning"]
    assert "rows.jsonl" in advice.next_command
    few = await climbed(topics(tmp_path / "few.jsonl", 60), lambda prompt: "Let me think.")
    assert few.approaches == ["prompting"]


async def test_a_model_that_only_lacks_the_paragraph_wants_retrieval(tmp_path: Path) -> None:
    def brain(prompt: list[dict[str, str]]) -> str:
        text = prompt[-1]["content"]
        return text.split(" is led by ")[1].split(".")[0] if "is led by" in text else "Person 1"

    advice = await climbed(write(tmp_path / "rows.jsonl", [fact(number) for number in range(200)]), brain)
    assert advice.evidence is not None
    assert advice.evidence.kind == "short text"
    assert [rung.name for rung in advice.evidence.rungs] == ["plain", "few-shot", "context"]
    assert advice.facts.gap == "knowledge"
    assert advice.approaches == ["rag", "prompting"]


async def test_what_is_stated_stands_against_what_is_measured(tmp_path: Path) -> None:
    path = topics(tmp_path / "rows.jsonl", 1200)
    advice = await climbed(path, lambda prompt: "no")
    assert advice.evidence is not None
    stated = advise(TaskFacts(gap="knowledge", strict_format=False, examples=5), advice.evidence)
    assert (stated.facts.gap, stated.facts.strict_format, stated.facts.examples) == ("knowledge", False, 5)


async def test_likeness_of_long_texts_decides_nothing(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Write a letter about {number}.", "completion": f"Dear all, {number} " + "and more words " * 20}
        for number in range(50)
    ]
    advice = await climbed(write(tmp_path / "rows.jsonl", rows), lambda prompt: "Dear all, and more words.")
    assert advice.evidence is not None
    assert (advice.evidence.kind, advice.evidence.metric) == ("long text", "ROUGE-L")
    assert 0 < advice.evidence.rungs[0].score < 1
    assert advice.facts.few_shot_works is None


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["acq", "earn", "Acq.", "earn"] * 10, "classification"),
        (['{"a": 1}', '{"b": 2}', '{"c": []}'], "json"),
        ([f"Person {number}" for number in range(50)], "short text"),
        ([f"{number} " + "word " * 40 for number in range(50)], "long text"),
    ],
)
def test_the_kind_of_task_shows_in_the_answers(answers: list[str], kind: str) -> None:
    assert kind_of(answers) == kind


@given(count=st.integers(2, 60), rows=st.integers(10, 40), shots=st.integers(0, 20))
@settings(max_examples=40)
def test_no_row_is_asked_that_is_shown_as_an_example(count: int, rows: int, shots: int) -> None:
    examples = Examples(count, tuple(Example(topic(number), "") for number in range(count)))
    ladder = plan_ladder(examples, rows=rows, shots=shots)
    asked = [example.row[1]["content"] for example in ladder.asked]
    shown = [row[1]["content"] for row in ladder.shots]
    assert asked
    assert len(asked) <= rows
    assert len(shown) <= shots
    assert not set(asked) & set(shown)
    for name in ladder.rungs:
        for example, prompt in zip(ladder.asked, prompts_for(ladder, name), strict=True):
            assert prompt[-1]["role"] == "user"
            assert example.row[1]["content"] in prompt[-1]["content"]


def test_the_paragraph_stands_in_the_prompt_and_the_answer_does_not() -> None:
    ladder = Ladder("short text", (), (Example(topic(1), "The paragraph."),), (topic(2),), 16)
    (prompt,) = prompts_for(ladder, "context")
    assert "The paragraph." in prompt[-1]["content"]
    assert all(answer_of(topic(1)) not in message["content"] for message in prompt)
    assert [message["role"] for message in prompts_for(ladder, "few-shot")[0]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_equal_prompts_count_once_and_bad_lines_are_named(tmp_path: Path) -> None:
    path = topics(tmp_path / "rows.jsonl", 20)
    path.write_text(path.read_text() * 2)
    assert read_examples(path).distinct == 20
    path.write_text(path.read_text() + '{"prompt": "no answer"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:41"):
        read_examples(path)


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-shaped server whose model knows the topics."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = int(body["messages"][-1]["content"].split()[-1])
        text = LABELS[number % 3] if body["model"] == "base" else "?"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        answer = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_the_command_measures_a_served_model_and_cites_it(server: str, tmp_path: Path) -> None:
    path = topics(tmp_path / "rows.jsonl", 60)
    arguments = ["--data", str(path), "--model", "base", "--url", server, "--key", "lk-x", "--rows", "20"]
    document = json.loads(CliRunner().invoke(advise_app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert document["approaches"] == ["prompting"]
    assert document["facts"]["few_shot_works"] is True
    assert [rung["prompt_tokens"] for rung in document["evidence"]["rungs"]] == [9, 9]
    shown = CliRunner().invoke(advise_app, arguments, catch_exceptions=False)
    assert "Measured on base, accuracy of 20 rows" in shown.stdout
    with pytest.raises(ConfigError, match="--model"):
        CliRunner().invoke(advise_app, ["--data", str(path)], catch_exceptions=False)
