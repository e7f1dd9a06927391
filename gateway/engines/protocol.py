"""The seam to an engine: everything the gateway may ask of one. `vllm` is the real one, `echo` the stand-in for tests."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class EngineResponse(Protocol):
    """An answer being received. Leaving its context early closes the connection, which aborts the generation."""

    @property
    def status(self) -> int: ...

    @property
    def content_type(self) -> str: ...

    async def read(self) -> bytes:
        """The whole body. Raises EngineUnavailableError when the engine goes away meanwhile."""
        ...

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body in pieces as they arrive, cut anywhere. Raises EngineUnavailableError as `read` does."""
        ...


@dataclass(frozen=True)
class EngineAdapters:
    """What an engine holds: names it answers to, and which of those sit in its host cache or a LoRA slot."""

    registered: frozenset[str]  # names the engine's API accepts
    resident: frozenset[str]  # names whose weights are in the engine's memory


@dataclass(frozen=True)
class Produced:
    """What an engine made for a request that is still running."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Engine(Protocol):
    """One engine process as the gateway's client sees it. Adapter names are engine names (`adapters.names`)."""

    @property
    def id(self) -> str: ...

    def open(
        self, path: str, body: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AbstractAsyncContextManager[EngineResponse]:
        """POST a JSON body to one of the engine's endpoints. Raises EngineUnavailableError when it cannot be reached."""
        ...

    async def load(self, name: str, folder: Path) -> None:
        """Make `name` answer from the PEFT folder (absolute, immutable). Already loaded under that name is success.

        Raises AdapterLoadError when the engine refuses it, EngineUnavailableError when it cannot be reached.
        """
        ...

    async def remove(self, name: str) -> None:
        """Forget the name and free its weights. An unknown name is success."""
        ...

    async def pin(self, name: str) -> None:
        """Keep the adapter from being evicted."""
        ...

    async def adapters(self) -> EngineAdapters:
        """The engine's own list: the truth that the gateway's view is reconciled with."""
        ...

    async def produced(self, request_id: str) -> Produced | None:
        """For the request with this `x-request-id`; None when none such is running. Raises EngineUnavailableError."""
        ...

    async def healthy(self) -> bool:
        """The engine says it is up. (Says nothing about its answers; the canary does.)"""
        ...

    async def metrics(self) -> str:
        """Prometheus text exposition."""
        ...

    async def close(self) -> None: ...


class EngineHost(Protocol):
    """Whoever keeps an engine alive: the supervisor of a process, or a test's plain holder."""

    @property
    def engine(self) -> Engine: ...

    @property
    def state(self) -> str:
        """One of stopped, starting, restoring, ready, restarting, failed. Only a ready engine is routed to."""
        ...

    async def start(self) -> None:
        """Returns when the engine is ready. Raises EngineStartError."""
        ...

    async def stop(self) -> None: ...

    async def restart(self, reason: str) -> None: ...
