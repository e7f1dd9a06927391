"""An evaluation through a stand-in for the gateway: who is asked what, and what comes of the answers."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from adapters.evaluations import Evaluation as Attached
from adapters.manifest import BaseFingerprint, Manifest, read_manifest, write_manifest
from trainer.data.chat import Row, write_rows
from trainer.data.sources import chat_row
from trainer.errors import EvaluationError
from trainer.evaluation import report
from trainer.evaluation.approaches import Approach, Comparison, measure_approach, monthly_cost
from trainer.evaluation.client import ChatClient, wait_s
from trainer.evaluation.compare import (
    Evaluation,
    Rivals,
    evaluate,
    load_rows,
    parse_rivals,
    subjects_for,
    with_examples,
)
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.page import render_page
from trainer.evaluation.served import attach, find_predecessor, pin

ROWS: list[Row] = [chat_row("Pick.", f"question {number}", "earn" if number % 2 else "acq") for number in range(10)]
EXAMPLES: list[Row] = [chat_row("Pick.", "example", "earn")]
CONFIG = EvalConfig(name="toy", task="classification", dataset="toy", labels=["acq", "earn"], concurrency=2)


class Gateway:
    """Answers like a gateway: the adapter is always right, the base always says earn; refuses each prompt once."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.refused: set[str] = set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            name = request.url.path.rsplit("/", 1)[-1]
            if name == "unknown":
                return httpx.Response(404, json={"error": {"message": "The model 'unknown' does not exist."}})
            return httpx.Response(200, json={"id": name} | ({} if name == "base" else {"parent": "base"}))
        body = json.loads(request.content)
        key = request.content.decode()
        if key not in self.refused:
            self.refused.add(key)
            return httpx.Response(429, headers={"retry-after": "0"}, json={"error": {"message": "later"}})
        self.asked[f"{body['model']} {len(body['messages'])}"] += 1
        question = body["messages"][-1]["content"]
        right = "earn" if int(question.split()[-1]) % 2 else "acq"
        text = right if body["model"].startswith("support") else "earn"
        choice = {"message": {"content": text}, "finish_reason": "stop" if body["model"] != "base" else "length"}
        usage = {"prompt_tokens": 30, "completion_tokens": 7}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})


def client_for(gateway: Gateway) -> ChatClient:
    return ChatClient("http://gateway", "lk-x", tenant="acme", transport=httpx.MockTransport(gateway))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def run(gateway: Gateway, predecessor: str | None = None) -> Evaluation:
    async with client_for(gateway) as client:
        subjects = await subjects_for(client, "support", base=None, predecessor=predecessor, examples=EXAMPLES)
        return await evaluate(CONFIG, client, subjects, ROWS)


async def test_every_subject_is_asked_every_row() -> None:
    gateway = Gateway()
    evaluation = await run(gateway, predecessor="support@1")
    assert gateway.asked == {"base 2": 10, "base 4": 10, "support@1 2": 10, "support 2": 10}
    assert evaluation.metrics["adapter"]["accuracy"] == 1.0
    assert evaluation.metrics["few-shot"]["accuracy"] == 0.5
    assert evaluation.metrics["base"]["stop_rate"] == 0.0
    assert evaluation.p_against("few-shot") == pytest.approx(2 * 0.5**5)
    assert evaluation.p_against("predecessor") == 1.0


async def test_the_report_is_json_and_tables() -> None:
    evaluation = await run(Gateway())
    document = json.loads(json.dumps(report.document(evaluation)))
    assert document["metrics"]["adapter"]["accuracy"] == 1.0
    assert len(document["answers"]) == 10
    assert document["answers"][0]["base"] == {"given": "earn", "correct": False, "valid": True, "stopped": False}
    assert document["intervals"]["adapter"]["accuracy"][1] == 1.0
    assert document["differences"]["few-shot"]["accuracy"]["test"] == "McNemar"
    assert document["detail"]["base"]["confusion"] == [[0, 5, 0], [0, 5, 0]]
    assert document["use"]["adapter"]["output_tokens"] == 7
    console = Console(width=120, record=True, quiet=True)
    console.print(report.samples_table(evaluation), report.metrics_table(evaluation))
    assert "50.0 points ahead of the few-shot base" in report.verdict(evaluation)


async def test_scores_go_into_the_manifest_once(tmp_path: Path) -> None:
    base = BaseFingerprint(model="m", weights_digest="w", template_digest="t")
    manifest = Manifest(
        name="support", base=base, rank=8, alpha=16, target_modules=["q_proj"], created_at=0, base_licence="MIT"
    )
    write_manifest(manifest, tmp_path)
    evaluation = await run(Gateway())
    report.add_to_manifest(evaluation, tmp_path)
    report.add_to_manifest(evaluation, tmp_path)
    written = read_manifest(tmp_path)
    assert written is not None
    assert len(written.scores) == 12
    assert names_in(tmp_path) == ["manifest.json"]


async def test_an_unknown_model_and_the_base_itself_are_refused() -> None:
    async with client_for(Gateway()) as client:
        with pytest.raises(EvaluationError, match="does not exist"):
            await subjects_for(client, "unknown", base=None, predecessor=None, examples=[])
        with pytest.raises(EvaluationError, match="base model itself"):
            await subjects_for(client, "base", base=None, predecessor=None, examples=[])


async def test_a_gateway_that_is_not_there_is_named() -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with ChatClient("http://gateway", "k", transport=httpx.MockTransport(refuse)) as client:
        with pytest.raises(EvaluationError, match="lorikeet up"):
            await client.answers("support", [ROWS[0]], max_tokens=1, concurrency=1)


def test_examples_come_between_system_and_question() -> None:
    prompt = with_examples(ROWS[0], EXAMPLES)
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[-1]["content"] == "question 0"


def test_rows_come_from_files_of_ones_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "eval.jsonl", ROWS)
    write_rows(tmp_path / "train.jsonl", [*ROWS[:3], *EXAMPLES])
    config = EvalConfig(
        name="own", task="classification", eval=Path("eval.jsonl"), train=Path("train.jsonl"), rows=4, shots=2
    )
    rows, examples = load_rows(config, relative_to=tmp_path, fetch=lambda name: tmp_path)
    assert len(rows) == 4
    assert {row[-1]["content"] for row in examples} == {"acq", "earn"}


@pytest.mark.parametrize(("header", "expected"), [("2", 2.0), ("900", 10.0), (None, 1.0), ("soon", 1.0)])
def test_the_wait_is_what_the_gateway_asks_for_within_reason(header: str | None, expected: float) -> None:
    assert wait_s(header, 2) == expected


@pytest.mark.parametrize(("url", "key"), [("http://127.0.0.1:many", "lk-1"), ("http://127.0.0.1:1", "lk-…")])
def test_an_address_or_a_key_that_can_be_none_is_refused(url: str, key: str) -> None:
    with pytest.raises(EvaluationError, match="is no"):
        ChatClient(url, key)


def test_baselines_are_named_by_commas() -> None:
    assert parse_rivals("base,few-shot") == Rivals()
    assert parse_rivals("few-shot, predecessor") == Rivals(base=False, predecessor="")
    assert parse_rivals("base,support@1").predecessor == "support@1"
    assert parse_rivals("predecessor@support@1").predecessor == "support@1"
    for wrong in ("", "base,a@1,b@2", "base,not a model"):
        with pytest.raises(EvaluationError):
            parse_rivals(wrong)


async def test_the_page_is_one_file_with_every_figure_and_no_answer_in_its_markup() -> None:
    evaluation = await run(Gateway(), predecessor="support@1")
    evaluation = replace(
        evaluation, rows=tuple([*row[:-2], {**row[-2], "content": "<b>q</b>"}, row[-1]] for row in ROWS)
    )
    gate = {"allowed": False, "reasons": ["too few rows"], "passed": []}
    page = render_page(report.document(evaluation), verdict=report.verdict(evaluation), gate=gate)
    for said in ("50.0 points ahead", "95 % interval", "refuses it", "too few rows", "&lt;b&gt;q&lt;/b&gt;"):
        assert said in page
    assert "<b>q" not in page
    assert not re.search(r'(src|href)="?http', page)


async def test_a_stored_report_holds_the_scores_that_are_attached(tmp_path: Path) -> None:
    evaluation = await run(Gateway())
    path = report.write_document(evaluation, tmp_path / "report.json")
    assert report.scores_from(report.read_document(path)) == evaluation.scores()
    path.write_text("{}")
    with pytest.raises(EvaluationError, match="no report"):
        report.read_document(path)


class Registry:
    """An adapter with three versions, the second in production."""

    def __init__(self) -> None:
        self.attached: list[dict[str, object]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.endswith("/gate"):
            return httpx.Response(200, json={"allowed": True, "reasons": [], "passed": []})
        if path.endswith("/evaluations"):
            self.attached.append(json.loads(request.content))
            return httpx.Response(201, json={"id": "eval-1"})
        if "/versions/" in path:
            return httpx.Response(200, json={"digest": path.rsplit("/", 1)[-1] * 64})
        return httpx.Response(200, json={"production": 2, "previous": 1})


async def test_a_name_is_pinned_to_its_version_and_the_result_attached_to_it() -> None:
    registry = Registry()
    async with ChatClient("http://gateway", "k", transport=httpx.MockTransport(registry)) as client:
        pinned = await pin(client, "support")
        assert (pinned.model, pinned.digest) == ("support@2", "2" * 64)
        assert await find_predecessor(client, "support") == "support@1"
        assert await find_predecessor(client, "support@3") == "support@2"
        gate = await attach(client, pinned, Attached(model=pinned.model, digest=pinned.digest))
        with pytest.raises(EvaluationError, match="NAME@VERSION"):
            await pin(client, "no model")
    assert gate["allowed"] is True
    assert registry.attached == [{"model": "support@2", "digest": "2" * 64, "scores": []}]


async def test_approaches_are_measured_on_the_same_rows_and_priced_by_their_time() -> None:
    comparison = Comparison(
        eval="toy",
        approaches=(Approach(name="few-shot", model="base", shots=1), Approach(name="LoRA", model="support")),
        requests_per_month=1000,
        machine_per_hour=1.0,
    )
    gateway = Gateway()
    async with client_for(gateway) as client:
        few_shot, tuned = [
            await measure_approach(one, comparison, CONFIG, client, ROWS, EXAMPLES) for one in comparison.approaches
        ]
    assert (few_shot.score.value, tuned.score.value) == (0.5, 1.0)
    assert gateway.asked == {"base 4": 14, "support 2": 14}  # four of each to warm up
    assert tuned.cost_per_month == pytest.approx(1000 / (tuned.requests_per_s * 0.5) / 3600)


@pytest.mark.parametrize(("rate", "cost", "machines"), [(1.0, 730.0, 1), (0.1, 4 * 730.0, 4)])
def test_a_dedicated_machine_is_paid_for_whole(rate: float, cost: float, machines: int) -> None:
    assert monthly_cost(730 * 720, rate, per_hour=1.0, busy=0.5, dedicated=True) == (cost, machines)
    shared, none = monthly_cost(730 * 720, rate, per_hour=1.0, busy=0.5, dedicated=False)
    assert (shared <= cost, none) == (True, None)
