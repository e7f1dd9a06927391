"""A gateway on the stand-in engine behind real HTTP, with one adapter, `support`, and the official client for it."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.factories import make_adapter, make_base, zip_folder
from tests.gateway.conftest import Gateway, listening, running_gateway


@dataclass
class Counted:
    """ASGI middleware that counts requests by path."""

    app: ASGIApp
    requests: Counter[str] = field(default_factory=Counter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests[scope["path"]] += 1
        await self.app(scope, receive, send)


@dataclass
class Served:
    """What a test holds: the gateway's inside, its address, and how often it was asked."""

    gateway: Gateway
    url: str
    requests: Counter[str]

    async def client(self, tenant: str = "acme", *, retries: int = 0, timeout_s: float = 30) -> openai.AsyncOpenAI:
        key = await self.gateway.key(tenant)
        return openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=retries, timeout=timeout_s)

    async def upload(self, folder: Path, name: str, tenant: str = "acme") -> None:
        """An adapter that answers when this returns."""
        async with await self.gateway.client(tenant) as client:
            files = {"file": ("a.zip", zip_folder(folder))}
            answer = await client.post("/v1/adapters?wait=true", data={"name": name}, files=files)
            assert answer.status_code == 201, answer.text


@pytest.fixture
async def served(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    base = make_base(tmp_path_factory.mktemp("base") / "tiny")
    async with running_gateway(tmp_path / "home", base) as gateway:
        counted = Counted(gateway.app)
        async with listening(counted) as url:
            made = Served(gateway, f"{url}/v1", counted.requests)
            await made.upload(make_adapter(tmp_path / "support", base), "support")
            yield made


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with await served.client() as made:
        yield made
