"""The advisor's rungs on a real engine, behind the whole gateway."""

import json
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from adapters.registry import Scope
from gateway.services import Services
from trainer.advise import TaskFacts, advise
from trainer.data.chat import Row
from trainer.evaluation.client import Answer, ChatClient
from trainer.rungs import climb, plan_ladder, read_examples

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


async def test_facts_nobody_could_know_are_found_wanting_in_every_prompt_without_the_paragraph(
    app: FastAPI, tmp_path: Path
) -> None:
    services: Services = app.state.services
    services.registry.create_tenant("acme")
    _, key = services.registry.create_key("acme", [Scope.INFERENCE])
    await services.directory.refresh()
    names = ("Ada Bell", "Cem Dal", "Eva Fry", "Gus Hay", "Ida Joy", "Ken Low")
    rows = [
        {
            "system": "Answer with a name and nothing else.",
            "prompt": f"Who runs depot {number}?",
            "completion": f"{names[number % 6]} {number}",
            "context": f"Depot {number} is run by {names[number % 6]} {number}.",
        }
        for number in range(11, 35)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(path)
    ladder = plan_ladder(examples, rows=12, shots=4)
    async with ChatClient("http://gateway", key, transport=httpx.ASGITransport(app)) as client:

        async def ask(rung: str, prompts: list[Row], max_tokens: int) -> list[Answer]:
            return await client.answers(services.base.name, prompts, max_tokens=max_tokens, concurrency=4)

        evidence = await climb(ladder, ask, model=services.base.name, data=str(path), distinct=examples.distinct)
    plain, few_shot, context = evidence.rungs
    assert [rung.name for rung in evidence.rungs] == ["plain", "few-shot", "context"]
    assert plain.score == 0
    assert plain.prompt_tokens < context.prompt_tokens < few_shot.prompt_tokens
    advice = advise(TaskFacts(), evidence)
    assert advice.facts.few_shot_works is False
    assert f"Measured on {services.base.name}, exact match of 12 rows" in advice.reasons[0]
