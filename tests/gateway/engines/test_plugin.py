import asyncio
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway.engines.plugin import LorikeetPlugin


@dataclass(frozen=True)
class Lora:
    lora_int_id: int


@dataclass
class StandInClient:
    """What the plugin uses of vLLM's AsyncLLM."""

    ids: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    running: list[str] = field(default_factory=list)
    states: list[Namespace] = field(default_factory=list)

    @property
    def output_processor(self) -> Namespace:
        states = [*(Namespace(lora_name=name) for name in self.running), *self.states]
        return Namespace(request_states=dict(enumerate(states)))

    async def list_loras(self) -> list[int]:
        return list(self.ids)

    async def add_lora(self, lora: Lora) -> bool:
        self.ids.add(lora.lora_int_id)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.ids.discard(lora_id)
        return True

    async def pin_lora(self, lora_id: int) -> bool:
        if lora_id == 3:
            raise RuntimeError("no free slot")
        self.pinned.add(lora_id)
        return True


@pytest.fixture
def engine() -> StandInClient:
    return StandInClient(ids={1, 3, 9})


@pytest.fixture
async def client(engine: StandInClient) -> httpx.AsyncClient:
    """A client of an app whose engine has `a` and `c` resident, `b` evicted, and one id that no name belongs to."""
    app = FastAPI()
    loras = {"a": Lora(1), "b": Lora(2), "c": Lora(3)}
    app.state.openai_serving_models = Namespace(lora_requests=loras, lora_resolver_lock=defaultdict(asyncio.Lock))
    plugin = LorikeetPlugin()
    plugin.attach_router(app)
    await plugin.init_state(engine, app.state, Namespace())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")


async def listed(client: httpx.AsyncClient) -> dict[str, tuple[bool, bool]]:
    found: list[dict[str, Any]] = (await client.get("/lorikeet/adapters")).json()["adapters"]
    return {entry["name"]: (entry["registered"], entry["resident"]) for entry in found}


async def test_the_list_tells_names_and_residency_and_counts_the_unnamed(client: httpx.AsyncClient) -> None:
    assert await listed(client) == {"a": (True, True), "b": (True, False), "c": (True, True)}
    assert (await client.get("/lorikeet/adapters")).json()["unnamed"] == 1


async def test_removing_forgets_the_name_and_frees_the_weights(
    client: httpx.AsyncClient, engine: StandInClient
) -> None:
    answer = await client.post("/lorikeet/remove", json={"name": "a"})
    assert answer.json() == {"removed": True}
    assert engine.ids == {3, 9}
    assert "a" not in await listed(client)


async def test_removing_an_unknown_name_is_success(client: httpx.AsyncClient) -> None:
    answer = await client.post("/lorikeet/remove", json={"name": "x"})
    assert (answer.status_code, answer.json()) == (200, {"removed": False})


async def test_weights_stay_while_a_request_runs_and_go_at_the_next_call(
    client: httpx.AsyncClient, engine: StandInClient
) -> None:
    engine.running = ["a", "b", "a"]
    answer = await client.post("/lorikeet/remove", json={"name": "a"})
    assert answer.status_code == 409
    assert "2 running" in answer.json()["error"]["message"]
    assert await listed(client) | {} == {"a": (False, True), "b": (True, False), "c": (True, True)}
    engine.running = []
    assert (await client.post("/lorikeet/remove", json={"name": "a"})).json() == {"removed": True}
    assert engine.ids == {3, 9}


async def test_pinning_brings_an_evicted_adapter_back_first(client: httpx.AsyncClient, engine: StandInClient) -> None:
    assert (await client.post("/lorikeet/pin", json={"name": "b"})).json() == {"pinned": True}
    assert engine.ids == {1, 2, 3, 9}
    assert engine.pinned == {2}


async def test_pinning_says_why_it_cannot(client: httpx.AsyncClient) -> None:
    assert (await client.post("/lorikeet/pin", json={"name": "x"})).status_code == 404
    answer = await client.post("/lorikeet/pin", json={"name": "c"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "'c' cannot be pinned: no free slot")


def state(external_id: str, *, prompt: int, cached: int, output: int, parent: Namespace | None = None) -> Namespace:
    """What the plugin reads of vLLM's RequestState."""
    return Namespace(
        external_req_id=external_id,
        parent_req=parent,
        prompt_len=prompt,
        num_cached_tokens=cached,
        detokenizer=Namespace(num_output_tokens=lambda: output),
    )


async def test_a_running_request_tells_what_it_came_to_with_its_prompt_counted_once_for_all_choices(
    client: httpx.AsyncClient, engine: StandInClient
) -> None:
    parent = Namespace(external_req_id="chatcmpl-req_a")
    engine.states = [
        state("chatcmpl-req_a", prompt=10, cached=4, output=3, parent=parent),
        state("chatcmpl-req_a", prompt=10, cached=4, output=5, parent=parent),
        state("cmpl-req_b-0", prompt=2, cached=0, output=1),
        state("cmpl-req_b-1", prompt=3, cached=0, output=1),
    ]
    chat = (await client.get("/lorikeet/produced/req_a")).json()
    assert chat == {"prompt_tokens": 10, "cached_tokens": 4, "output_tokens": 8}
    several = (await client.get("/lorikeet/produced/req_b")).json()
    assert several == {"prompt_tokens": 5, "cached_tokens": 0, "output_tokens": 2}
    assert (await client.get("/lorikeet/produced/req_c")).status_code == 404
