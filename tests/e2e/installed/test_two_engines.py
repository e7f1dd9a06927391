"""Two vLLM processes behind one gateway, and one is killed under traffic."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.engines.leftovers import read_record
from tests.e2e.installed.machine import Machine
from tests.factories import make_adapter

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

LONG = 300  # tokens: seconds
SHORT = 8


class Two:
    """What the operator started, and the key of one of its tenants."""

    def __init__(self, machine: Machine, started: dict[str, Any], key: str) -> None:
        self.machine = machine
        self.url: str = started["url"]
        self.base: str = started["base_model"]
        self.key = key

    def client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120)

    def chat(self, model: str, tokens: int, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Count."}]
        return {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True} | fields

    def states(self) -> dict[str, str]:
        return {engine["id"]: engine["state"] for engine in self.machine.json("status")["engines"]}


@pytest.fixture
def two(machine: Machine, base_model: Path, tmp_path: Path) -> Two:
    machine.environment["LORIKEET_ENGINES"] = "2"
    started = machine.json("up")
    machine.run("tenants", "create", "acme")
    scopes = ("--scope", "inference", "--scope", "adapters:write", "--scope", "adapters:read")
    key = machine.json("keys", "create", "--tenant", "acme", *scopes)["key"]
    folder = make_adapter(tmp_path / "support", base_model, rank=8)
    machine.run("push", str(folder), "--name", "support", "--tenant", "acme")
    return Two(machine, started, key)


async def until(two: Two, wanted: set[str]) -> None:
    async with asyncio.timeout(240):
        while set((await asyncio.to_thread(two.states)).values()) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(4)  # asking takes half a second of the processor that the engine starts on


async def streamed(client: httpx.AsyncClient, body: dict[str, Any], begun: asyncio.Event) -> tuple[str, str]:
    """Which engine answered, and the last event."""
    last = ""
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            begun.set()
            last = line or last
        request = response.headers["x-request-id"]
    return str((await client.get(f"/v1/requests/{request}")).json()["replica"]), last


async def test_the_other_engine_serves_on_when_one_is_killed_and_both_are_back_afterwards(two: Two) -> None:
    assert two.states() == {"engine-0": "ready", "engine-1": "ready"}
    async with two.client() as client:
        begun = [asyncio.Event() for _ in range(4)]
        models = ["support", two.base] * 2
        streams = [
            asyncio.create_task(streamed(client, two.chat(model, LONG), event))
            for model, event in zip(models, begun, strict=True)
        ]
        for event in begun:
            await event.wait()
        record = read_record(two.machine.home / "run" / "engine-0.json")
        assert record is not None
        assert record.engine_pid is not None
        os.killpg(record.engine_pid, signal.SIGKILL)
        asked = [
            client.post("/v1/chat/completions", json=two.chat(model, SHORT)) for model in ("support", two.base) * 4
        ]
        answers = await asyncio.gather(*asked)
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        assert (await client.get("/readyz")).status_code == 200
        ended = await asyncio.gather(*streams)
    cut = {engine for engine, last in ended if "error" in last}
    whole = {engine for engine, last in ended if last == "data: [DONE]"}
    assert (cut, whole) == ({"engine-0"}, {"engine-1"})
    await until(two, {"ready"})
    resident = {engine["id"]: engine["resident"] for engine in two.machine.json("status")["engines"]}
    assert all("support" in str(names) for names in resident.values()), resident
