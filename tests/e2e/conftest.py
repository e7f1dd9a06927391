"""A whole gateway around the session's engine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest_asyncio
from fastapi import FastAPI

from gateway.app import create_app
from gateway.engines.process import EngineProcess
from gateway.engines.protocol import Engine
from gateway.services import OnReady, Services
from gateway.settings import Settings


@dataclass
class SharedEngine:
    """The session's engine as a gateway's own: started when the gateway is, and not stopped with it."""

    process: EngineProcess
    on_ready: OnReady
    _before: Callable[[Engine], Awaitable[None]] | None = field(init=False)

    @property
    def engine(self) -> Engine:
        return self.process.engine

    @property
    def state(self) -> str:
        return self.process.state

    async def start(self) -> None:
        self._before, self.process.on_ready = self.process.on_ready, self.on_ready
        await self.on_ready(self.engine)

    async def stop(self) -> None:
        self.process.on_ready = self._before

    async def restart(self, reason: str) -> None:
        await self.process.restart(reason)


@pytest_asyncio.fixture(loop_scope="session")
async def app(engine_process: EngineProcess, base_model: Path, adapter_folder: Path) -> AsyncIterator[FastAPI]:
    settings = Settings.model_validate(
        {
            "LORIKEET_HOME": adapter_folder / "home",
            "base": str(base_model),
            "engine": "test",
            "canary": {"interval_s": 1},
            "probe": {"stall_share": 1},
        }
    )
    app = create_app(settings, lambda on_ready: SharedEngine(engine_process, on_ready))
    async with app.router.lifespan_context(app):
        yield app
        services: Services = app.state.services
        services.onboarding.departures.grace_s = 0.0
        for record in await asyncio.to_thread(services.registry.adapters):
            await services.onboarding.delete_adapter(record.tenant, record.name, actor="test")
        await services.onboarding.departures.done()
