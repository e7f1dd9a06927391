"""A whole gateway on the stand-in engine: real registry, real blobs, real HTTP; only the model is not there."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from adapters.records import Deployment
from adapters.registry import Scope
from gateway.app import create_app
from gateway.engines.echo import EchoEngine
from gateway.engines.echo_answers import Voice
from gateway.engines.profile import EngineProfile
from gateway.engines.protocol import Engine
from gateway.onboarding import VALIDATIONS
from gateway.services import OnReady, Services
from gateway.settings import Settings
from tests.databases import migrated_file
from tests.factories import make_base
from tests.gateway.redis_server import RedisServer

EVERYTHING = frozenset({Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE})


@dataclass
class EchoHost:
    """Keeps an EchoEngine the way a supervisor keeps a process: it can be killed and comes back fresh."""

    make: Callable[[], EchoEngine]
    on_ready: OnReady
    id: str = "echo"
    state: str = "stopped"
    restarts: list[str] = field(default_factory=list)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self._fresh()
        self._may_end = asyncio.Event()
        self._may_end.set()

    def _fresh(self) -> EchoEngine:
        engine = self.make()
        engine.id = self.id
        return engine

    def kill(self) -> None:
        """The process ends, and whoever watches it has noticed."""
        assert isinstance(self.engine, EchoEngine)
        self.engine.die()
        self.state = "restarting"

    async def come_back(self) -> None:
        self.engine = self._fresh()
        await self.start()

    async def start(self) -> None:
        self.state = "restoring"
        try:
            await self.on_ready(self.engine)
        except BaseException:
            self.state = "failed"
            raise
        self.state = "ready"

    @asynccontextmanager
    async def held_up(self) -> AsyncIterator[None]:
        """It does not come to its end while the block lasts."""
        self._may_end.clear()
        yield
        self._may_end.set()

    async def stop(self) -> None:
        await self._may_end.wait()
        self.state = "stopped"

    async def restart(self, reason: str) -> None:
        self.restarts.append(reason)
        self.state = "restarting"
        await self.come_back()


@dataclass
class Gateway:
    """What a test holds in its hands."""

    app: FastAPI
    services: Services
    settings: Settings
    hosts: list[EchoHost]
    base: Path
    dedicated: dict[str, EchoHost] = field(default_factory=dict)  # engines of one merged version, by folder

    @property
    def host(self) -> EchoHost:
        return self.hosts[0]

    @property
    def engine(self) -> EchoEngine:
        assert isinstance(self.host.engine, EchoEngine)
        return self.host.engine

    async def key(self, tenant: str = "acme", scopes: frozenset[Scope] = EVERYTHING) -> str:
        """A key of the tenant, which is created when need be."""

        def make() -> str:
            registry = self.services.registry
            if tenant not in {known.name for known in registry.tenants()}:
                registry.create_tenant(tenant)
            return registry.create_key(tenant, scopes)[1]

        plaintext = await asyncio.to_thread(make)
        await self.services.directory.refresh()
        return plaintext

    async def client(self, tenant: str = "acme", scopes: frozenset[Scope] = EVERYTHING) -> httpx.AsyncClient:
        """A client with a key of the tenant, without a network."""
        return self.anonymous({"authorization": f"Bearer {await self.key(tenant, scopes)}"})

    @asynccontextmanager
    async def checks_held_up(self) -> AsyncIterator[None]:
        """No upload is checked while the block lasts: every turn is taken."""
        turns = self.services.onboarding.validating
        for _ in range(VALIDATIONS):
            await turns.acquire()
        try:
            yield
        finally:
            for _ in range(VALIDATIONS):
                turns.release()

    def operator(self, tenant: str | None = None) -> httpx.AsyncClient:
        key = self.settings.home.operator_key.read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        return self.anonymous(headers | ({"openai-project": tenant} if tenant else {}))

    def anonymous(self, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://lorikeet", headers=headers, timeout=30)


@asynccontextmanager
async def running_gateway(
    data: Path, base: Path, *, engine: Callable[[], EchoEngine] = lambda: EchoEngine(slots=4), **changes: object
) -> AsyncIterator[Gateway]:
    """A gateway on a data folder of its own; a second call on the same folder is a restart.

    The engine of a merged version says what stands in the echo.txt of its folder.
    """
    settings = Settings.model_validate({"LORIKEET_HOME": data, "base": str(base), "engine": "test", **changes})
    if settings.database_url is None and not settings.home.database.exists():
        shutil.copy(migrated_file(), settings.home.create().database)
    hosts: list[EchoHost] = []

    def make_host(on_ready: OnReady) -> EchoHost:
        hosts.append(EchoHost(engine, on_ready, f"echo-{len(hosts)}" if settings.engines > 1 else "echo"))
        return hosts[-1]

    dedicated: dict[str, EchoHost] = {}

    def make_dedicated(deployment: Deployment, _profile: EngineProfile, _number: int, on_ready: OnReady) -> EchoHost:
        text = (settings.home.merged / deployment.folder / "echo.txt").read_text()

        def merged_engine() -> EchoEngine:
            made = engine()
            made.base = Voice(made.base.name, text, deployment.digest.encode())
            return made

        dedicated[deployment.folder] = EchoHost(merged_engine, on_ready, deployment.engine_id)
        return dedicated[deployment.folder]

    app = create_app(settings, make_host, make_dedicated=make_dedicated)
    async with app.router.lifespan_context(app):
        services: Services = app.state.services
        for _ in range(200):
            if all(replica.ready for replica in services.fleet.replicas):
                break
            await asyncio.sleep(0.01)
        yield Gateway(app, services, settings, hosts, base, dedicated)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model small enough to make in a moment; read-only."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
async def gateway(tmp_path: Path, tiny_base: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path / "home", tiny_base) as running:
        yield running


@pytest.fixture(scope="session")
def _redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(_redis_server: RedisServer) -> RedisServer:
    """Runs, and is empty."""
    _redis_server.thaw()
    _redis_server.clear()
    return _redis_server


class LoopbackServer(uvicorn.Server):
    """Says when it listens, and leaves signals to the test runner."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[str]:
    """Serve a started app on loopback, for streams and disconnects; its lifespan is the caller's business."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = LoopbackServer(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
