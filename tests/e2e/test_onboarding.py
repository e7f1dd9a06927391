"""Uploads, probes and the canary on a real engine, behind the whole gateway."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
import pytest_asyncio
from fastapi import FastAPI

from adapters.base import read_base
from adapters.manifest import Golden, Manifest, write_manifest
from adapters.registry import Scope
from adapters.tensors import save_tensors
from gateway.canary import corrupted_requests
from gateway.engines.process import EngineProcess
from gateway.engines.profile import BASE_NAME
from gateway.engines.protocol import Engine
from gateway.errors import EngineUnavailableError
from gateway.probe import PROMPTS, score
from gateway.services import Services
from tests.factories import adapter_tensors, make_adapter, zip_folder

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

SECRET_NAME = "acme/golden-source@1-00000000"


@pytest_asyncio.fixture(loop_scope="session")
async def acme(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    services: Services = app.state.services
    services.registry.create_tenant("acme")
    _, key = services.registry.create_key("acme", [Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE])
    await services.directory.refresh()
    transport = httpx.ASGITransport(app)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://l", headers=headers, timeout=240) as client:
        yield client


async def push(client: httpx.AsyncClient, folder: Path, name: str) -> httpx.Response:
    files = {"file": zip_folder(folder)}
    return await client.post("/v1/adapters", params={"wait": "true"}, data={"name": name}, files=files)


async def ask(client: httpx.AsyncClient, model: str, prompt: str = "The capital of France is") -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def goldens_of(engine: Engine, folder: Path) -> list[Golden]:
    """What the engine itself says of the adapter: the trainer's part, played by the reference at hand."""
    await engine.load(SECRET_NAME, folder)
    goldens = []
    for text in PROMPTS:
        async with engine.open("/tokenize", orjson.dumps({"model": BASE_NAME, "prompt": text})) as response:
            ids = orjson.loads(await response.read())["tokens"]
        adapter, base = [await score(engine, name, ids, timeout_s=60) for name in (SECRET_NAME, BASE_NAME)]
        half = len(ids) // 2
        goldens.append(
            Golden(
                messages=[{"role": "user", "content": text}],
                completion="",
                prompt_token_ids=ids[:half],
                completion_token_ids=ids[half:],
                logprobs=adapter[half - 1 :],
                base_logprobs=base[half - 1 :],
            )
        )
    await engine.remove(SECRET_NAME)
    return goldens


def with_manifest(folder: Path, base: Path, goldens: Sequence[Golden], *, alpha: float) -> Path:
    manifest = Manifest(
        name="support",
        base=read_base(base).fingerprint,
        rank=8,
        alpha=alpha,
        target_modules=["q_proj"],
        created_at=1,
        base_licence="Apache-2.0",
        goldens=list(goldens),
    )
    write_manifest(manifest, folder)
    return folder


def codes(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 422, answer.text
    return [fault["code"] for fault in answer.json()["error"]["faults"]]


async def test_an_adapter_served_as_trained_becomes_ready_and_a_halved_scale_is_refused_with_its_factor(
    app: FastAPI, acme: httpx.AsyncClient, base_model: Path, tmp_path: Path
) -> None:
    engine = app.state.services.fleet.replicas[0].engine
    targets = ("q_proj",)
    right = make_adapter(tmp_path / "right", base_model, rank=8, alpha=64, scale=0.05, targets=targets)
    halved = make_adapter(tmp_path / "halved", base_model, rank=8, alpha=32, scale=0.05, targets=targets)
    goldens = await goldens_of(engine, right)
    started_s = time.monotonic()
    answer = await push(acme, with_manifest(right, base_model, goldens, alpha=64), "support")
    assert answer.status_code == 201, answer.text
    assert time.monotonic() - started_s < 60
    probe = answer.json()["probe"]
    assert probe["method"] == "goldens"
    assert probe["deviation"] < 0.01 < probe["effect"]
    assert probe["scale"] == pytest.approx(1, abs=0.05)
    refused = await push(acme, with_manifest(halved, base_model, goldens, alpha=32), "support")
    assert "wrong_scale" in codes(refused)
    versions = (await acme.get("/v1/adapters/support/versions")).json()["data"]
    assert [version["status"] for version in versions] == ["refused", "ready"]
    assert await ask(acme, "support")


async def test_an_adapter_made_elsewhere_is_probed_for_its_effect(
    acme: httpx.AsyncClient, base_model: Path, tmp_path: Path
) -> None:
    answer = await push(acme, make_adapter(tmp_path / "a", base_model, rank=8), "elsewhere")
    assert answer.status_code == 201, answer.text
    assert answer.json()["probe"]["method"] == "prompts"
    assert answer.json()["probe"]["effect"] > 0.005
    assert answer.json()["warnings"]


async def test_log_probabilities_of_prompts_do_not_disturb_other_requests(
    app: FastAPI, acme: httpx.AsyncClient, base_model: Path, tmp_path: Path
) -> None:
    await push(acme, make_adapter(tmp_path / "a", base_model, rank=8), "beside")
    engine = app.state.services.fleet.replicas[0].engine
    before = await ask(acme, "beside")
    answers = await asyncio.gather(
        *(ask(acme, "beside") for _ in range(4)),
        *(score(engine, BASE_NAME, prompt * 4, timeout_s=60) for prompt in PROMPTS),
    )
    assert answers[:4] == [before] * 4


async def test_an_engine_poisoned_behind_the_gateways_back_is_noticed_and_restarted(
    app: FastAPI, acme: httpx.AsyncClient, engine_process: EngineProcess, base_model: Path, adapter_folder: Path
) -> None:
    services: Services = app.state.services
    await push(acme, make_adapter(adapter_folder / "good", base_model, rank=8), "bystander")
    before = await ask(acme, "bystander")
    nan = make_adapter(adapter_folder / "nan", base_model, rank=8)
    tensors = adapter_tensors(read_base(base_model), rank=8)
    tensors |= {name: np.full_like(value, np.nan) for name, value in tensors.items() if "layers.0." in name}
    save_tensors(nan / "adapter_model.safetensors", tensors)
    assert "not_finite" in " ".join(codes(await push(acme, nan, "poison")))  # the front door is closed

    restarts = engine_process.restarts
    engine = engine_process.engine
    await engine.load("acme/poison@1-00000000", nan)
    body = {"model": "acme/poison@1-00000000", "prompt": "hello", "max_tokens": 4}
    with suppress(EngineUnavailableError):  # the canary may be quicker than the answer
        async with engine.open("/v1/completions", orjson.dumps(body)) as response:
            assert response.status == 200  # vLLM finds nothing wrong
            await response.read()
    async with asyncio.timeout(20):
        await engine_process.reached("restarting")
    async with asyncio.timeout(240):
        await engine_process.reached("ready")
    assert engine_process.restarts == restarts + 1
    assert corrupted_requests(await engine_process.engine.metrics()) == 0
    assert (await services.canary.check(engine_process.engine)).ok
    assert await ask(acme, "bystander") == before
