"""A judging model through a stand-in for its endpoint: order, grades, what is kept, and what people think of it."""

import json
from pathlib import Path

import httpx
import pytest

from trainer.data.sources import question_row
from trainer.errors import DataError, EvaluationError
from trainer.evaluation.client import ChatClient
from trainer.evaluation.judge import Judge, JudgeConfig, Opinion, Pair, read_choice, read_grade
from trainer.evaluation.judging import Label, agree, calibrate, fitting, read_labels

CONFIG = JudgeConfig(url="http://judge", model="wise", input_price=1.0, output_price=2.0)
PROMPT = question_row("Why?", "x")[:1]


class Endpoint:
    """Prefers the longer answer, or always the first one; grades by the word 'good'."""

    def __init__(self, *, biased: bool = False) -> None:
        self.biased = biased
        self.asked = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        text = json.loads(request.content)["messages"][-1]["content"]
        if "### Answer A" in text:
            _, _, both = text.partition("### Answer A\n")
            first, _, second = both.partition("\n\n### Answer B\n")
            better = "A" if self.biased or len(first) > len(second) else "B" if len(second) > len(first) else "C"
            said = f"[[A]] might be thought, but: [[{better}]]"
        else:
            said = "[[5]]" if "good" in text else "[[1]]"
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


def client_for(endpoint: Endpoint) -> ChatClient:
    return ChatClient("http://judge", "k", transport=httpx.MockTransport(endpoint))


async def test_a_pair_is_won_in_both_orders_or_not_at_all() -> None:
    pairs = [Pair(PROMPT, "short", "a longer one"), Pair(PROMPT, "equal", "equal")]
    async with client_for(Endpoint()) as client:
        fair = await Judge(CONFIG, client).compare(pairs)
    assert [one.verdict for one in fair] == ["second", "tie"]
    assert not any(one.flipped for one in fair)
    async with client_for(Endpoint(biased=True)) as client:
        biased = await Judge(CONFIG, client).compare(pairs)
    assert [one.verdict for one in biased] == ["tie", "tie"]
    assert all(one.flipped for one in biased)


async def test_answers_are_kept_and_cost_is_told(tmp_path: Path) -> None:
    endpoint, cache = Endpoint(), tmp_path / "judges" / "answers.jsonl"
    pairs = [Pair(PROMPT, "a", "bb")]
    async with client_for(endpoint) as client:
        first = Judge(CONFIG, client, cache)
        opinions = await first.compare(pairs)
    assert (first.spent.asked, first.spent.kept) == (2, 0)
    assert first.spent.cost == pytest.approx(2 * (100 * 1.0 + 10 * 2.0) / 1e6)
    cache.write_text(cache.read_text() + '{"key": "cut off')
    async with client_for(endpoint) as client:
        again = Judge(CONFIG, client, cache)
        assert await again.compare(pairs) == opinions
    assert (again.spent.asked, again.spent.kept, endpoint.asked) == (0, 2, 2)


@pytest.mark.parametrize(
    ("text", "verdict"), [("[[A]]", "second"), ("[[B]]", "first"), ("so [[C]]", "tie"), ("A", None)]
)
def test_a_verdict_is_read_as_of_the_pairs_own_order(text: str, verdict: str | None) -> None:
    assert read_choice(text, swapped=True) == verdict


def test_a_grade_outside_the_scale_is_none() -> None:
    assert [read_grade(text, best=5) for text in ("[[3]]", "[[3]] no, [[4]]", "[[9]]", "four")] == [3, 4, None, None]


def test_what_cannot_be_read_is_a_tie_and_no_flip() -> None:
    opinion = Opinion("first", None)
    assert (opinion.verdict, opinion.readable, opinion.flipped) == ("tie", False, False)


def test_agreement_beyond_chance_has_its_known_value() -> None:
    compared = [("good", "good")] * 20 + [("good", "bad")] * 5 + [("bad", "good")] * 10 + [("bad", "bad")] * 15
    agreement, kappa = agree(compared)
    assert (agreement, round(kappa, 6)) == (0.7, 0.4)
    assert agree([("good", "good")] * 9) == (1.0, 0.0)


async def test_a_calibration_compares_pairs_and_single_answers() -> None:
    labels = [
        Label(PROMPT, "short", "a longer one", "second"),
        Label(PROMPT, "a longer one", "short", "second"),
        Label(PROMPT, "good", None, "good"),
        Label(PROMPT, "useless", None, "bad"),
    ]
    async with client_for(Endpoint()) as client:
        found, compared = await calibrate(Judge(CONFIG, client), labels)
    assert (found.labels, found.agreement, found.position_flips) == (4, 0.75, 0.0)
    assert compared[1] == ("second", "first")
    assert fitting(found, CONFIG) == found
    with pytest.raises(EvaluationError, match="another rubric"):
        fitting(found, CONFIG.model_copy(update={"rubric": "Be kind."}))


def test_labels_may_be_a_marked_sheet_and_faults_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows: list[dict[str, object]] = [
        {"messages": PROMPT, "first": "a", "second": "b", "human": "tie"},
        {"messages": PROMPT, "given": "a", "verdict": "good", "comment": ""},
        {"messages": PROMPT, "given": "b", "verdict": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [label.human for label in read_labels(path)] == ["tie", "good"]
    path.write_text(json.dumps({**rows[0], "human": "left"}) + "\nnonsense\n")
    with pytest.raises(DataError, match=r"labels\.jsonl:1.*\n.*labels\.jsonl:2"):
        read_labels(path)


def test_a_judge_without_a_key_says_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with pytest.raises(EvaluationError, match="JUDGE_API_KEY"):
        CONFIG.key()
