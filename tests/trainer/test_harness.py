"""lm-evaluation-harness on local data: its tasks as we write them, and, where it is installed, a whole run."""

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request

from tests.gateway.conftest import listening
from trainer.data.sources import question_row
from trainer.errors import EvaluationError
from trainer.evaluation.harness import HarnessTask, as_probe, run_harness, task_document

ROWS = [question_row(f"q{number}?", "B" if number % 2 else "A") for number in range(6)]


def test_a_task_reads_its_own_file_and_generates(tmp_path: Path) -> None:
    document = task_document(HarnessTask("mmlu", ROWS, "letter", 8), tmp_path / "rows.jsonl")
    assert document["output_type"] == "generate_until"
    assert document["dataset_kwargs"]["data_files"]["test"].endswith("rows.jsonl")


def test_a_python_without_the_harness_says_how_to_get_it(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(EvaluationError, match="--harness-python"):
        run_harness(
            [HarnessTask("mmlu", ROWS, "letter", 8)],
            url="http://127.0.0.1:9",
            key="k",
            model="m",
            tenant=None,
            concurrency=1,
            python=str(bare),
        )


def test_its_answers_become_a_probe() -> None:
    probe = as_probe("mmlu", {"base": [True] * 40, "adapter": [False] * 40})
    assert (probe.name, probe.red) == ("harness-mmlu", True)


@pytest.fixture
async def served() -> AsyncIterator[str]:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> dict[str, object]:
        assert request.headers["authorization"] == "Bearer lk-x"
        assert request.headers["openai-project"] == "acme"
        body = await request.json()
        text = "The answer is B." if body["messages"][-1]["content"] != "q1?" else "none"
        return {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}

    async with listening(app) as url:
        yield url


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra with pins of its own")
async def test_the_harness_asks_the_served_model(served: str) -> None:
    task = HarnessTask("mmlu", ROWS, "letter", 8)
    found = await asyncio.to_thread(
        run_harness, [task], url=served, key="lk-x", model="m", tenant="acme", concurrency=2
    )
    assert found == {"mmlu": [False, False, False, True, False, True]}
    assert json.dumps(found)
