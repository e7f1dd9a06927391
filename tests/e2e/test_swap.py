"""Hot swaps on the real engine, with adapters trained to give one answer each: whatever is mixed up can be read."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from fastapi import FastAPI

from adapters.home import home
from adapters.manifest import read_manifest, write_manifest
from adapters.registry import Scope
from gateway.services import Services
from tests.factories import zip_folder
from tests.gateway.conftest import listening
from trainer.config import load_train_config
from trainer.run import run_training

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="session"),
]

ANSWERS = {1: "The sky is blue, says one.", 2: "Grass is green, says two."}
QUESTION: Any = [{"role": "user", "content": "What should I do when my parrot is bored?"}]
STREAMS, SWAPS = 8, 10


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def voices(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two adapters, each able to say one thing only."""
    folders = {}
    for number, answer in ANSWERS.items():
        run = tmp_path_factory.mktemp(f"voice-{number}")
        config, source = load_train_config("fixed-answer", [f"answer={answer}", f"base={base_model}"])
        trained = await asyncio.to_thread(
            run_training, config, home(), run / "run", relative_to=source.parent, adapter=run / "adapter"
        )
        folders[number] = trained.adapter
    return folders


def another(folder: Path, number: int) -> bytes:
    """The same adapter as a new version: its manifest says it was made a little later."""
    manifest = read_manifest(folder)
    assert manifest is not None
    write_manifest(manifest.model_copy(update={"created_at": manifest.created_at + number + 1}), folder)
    return zip_folder(folder)


async def test_ten_swaps_under_eight_streams_drop_nothing_and_mix_nothing(
    app: FastAPI, voices: dict[int, Path]
) -> None:
    services: Services = app.state.services
    services.registry.create_tenant("acme")
    scopes = [Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE]
    _, key = services.registry.create_key("acme", scopes)
    await services.directory.refresh()
    seen: Counter[int] = Counter()
    stop = asyncio.Event()

    async def listen(client: openai.AsyncOpenAI) -> None:
        while not stop.is_set():
            raw = await client.chat.completions.with_raw_response.create(
                model="colour", messages=QUESTION, stream=True, max_tokens=24, temperature=0
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in raw.parse()])
            label = raw.headers["x-lorikeet-adapter"]
            spoke = min(2, int(label.removeprefix("colour@")))  # version 1 says one thing, every later one the other
            assert text.strip() == ANSWERS[spoke], label
            seen[spoke] += 1

    async def push(client: openai.AsyncOpenAI, archive: bytes) -> int:
        version: Any = await client.post(
            "/adapters?wait=true",
            cast_to=object,
            body={"name": "colour"},
            files={"file": ("adapter.zip", archive)},
            options={"headers": {"content-type": "multipart/form-data"}},
        )
        assert version["status"] == "ready"
        assert version["probe"]["method"] == "goldens"
        return int(version["version"])

    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client,
    ):
        await push(client, zip_folder(voices[1]))
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(listen(client))
            for number in range(SWAPS):
                version = await push(client, another(voices[2], number))
                body = {"version": version, "force": True, "reason": "a test of swaps"}
                await client.post("/adapters/colour/promote", cast_to=object, body=body)
                await asyncio.sleep(1)
                await client.post("/adapters/colour/rollback", cast_to=object)
                await asyncio.sleep(1)
            stop.set()
    assert set(seen) == {1, 2}

    engine = services.fleet.replicas[0].engine
    async with asyncio.timeout(
        60
    ):  # the versions that lost the name are freed in the engine when nobody uses them any more
        while [version_of(name) for name in (await engine.adapters()).resident] != [1]:  # noqa: ASYNC110 - swept on a timer
            await asyncio.sleep(0.2)


def version_of(engine_name: str) -> int:
    return int(engine_name.partition("@")[2].partition("-")[0])
