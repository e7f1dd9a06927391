"""An evaluation through a stand-in for the gateway: who is asked what, and what comes of the answers."""

import json
from collections import Counter
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from adapters.manifest import BaseFingerprint, Manifest, read_manifest, write_manifest
from trainer.data.chat import Row, write_rows
from trainer.data.sources import chat_row
from trainer.errors import EvaluationError
from trainer.evaluation import report
from trainer.evaluation.client import ChatClient, wait_s
from trainer.evaluation.compare import Evaluation, evaluate, load_rows, subjects_for, with_examples
from trainer.evaluation.config import EvalConfig

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
        return httpx.Response(200, json={"choices": [choice]})


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
    assert document["answers"][0]["base"] == {"given": "earn", "correct": False}
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
