"""The real engine: vLLM's HTTP API over a Unix socket, bytes in and bytes out."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from gateway.engines.protocol import EngineAdapters, Produced
from gateway.errors import AdapterLoadError, EngineError, EngineUnavailableError, EngineUnreachableError

# vLLM closes an idle connection after 5 s. A request that meets the closing cannot be repeated, so we close first.
KEEP_ALIVE_S = 3.0
CONTROL_TIMEOUT_S = 10.0  # answers that need no generation
LOAD_TIMEOUT_S = 120.0  # reads and copies the weights between two steps of the engine
CHUNK_BYTES = 1 << 16
_LOST = (
    aiohttp.ClientError,
    OSError,
    TimeoutError,
)  # ServerDisconnected, a cut body and a refused connection among them


class VllmResponse:
    """An answer being received."""

    def __init__(self, response: aiohttp.ClientResponse, engine: str) -> None:
        self._response = response
        self._engine = engine

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def content_type(self) -> str:
        return self._response.headers.get("Content-Type", "application/octet-stream")

    async def read(self) -> bytes:
        try:
            return await self._response.read()
        except _LOST as exc:
            raise _unavailable(self._engine, "broke off while answering", exc) from exc

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except _LOST as exc:
            raise _unavailable(self._engine, "broke off while answering", exc) from exc


class VllmEngine:
    """Implements `protocol.Engine`. Belongs to the event loop it is first used in; connections are made as needed."""

    def __init__(self, id: str, socket: Path) -> None:  # noqa: A002
        self.id = id
        self._socket = socket
        self._open_session: aiohttp.ClientSession | None = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._open_session is None:
            self._open_session = aiohttp.ClientSession(
                "http://engine",
                # Unlimited: how many requests run is the gateway's decision, and it was made before.
                connector=aiohttp.UnixConnector(str(self._socket), limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Content-Type": "application/json"},
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                read_bufsize=CHUNK_BYTES,
            )
        return self._open_session

    @asynccontextmanager
    async def open(
        self, path: str, body: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[VllmResponse]:
        try:
            response = await self._session.post(path, data=body, headers=headers)
        except aiohttp.ClientConnectorError as exc:
            raise EngineUnreachableError(f"Engine '{self.id}' cannot be reached.") from exc
        except _LOST as exc:
            raise _unavailable(self.id, "broke off before answering", exc) from exc
        try:
            yield VllmResponse(response, self.id)
        finally:
            response.close()  # not released: vLLM aborts when the connection goes. After the last byte this is a no-op

    async def load(self, name: str, folder: Path) -> None:
        status, answer = await self._post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, timeout_s=LOAD_TIMEOUT_S
        )
        answer = answer.replace(str(folder), name)  # tenants read it; where their files lie is ours to know
        if status == 200 or (status == 400 and "already been loaded" in answer):
            return
        if status >= 500 and not await self.healthy():  # a worker's refusal is a 500 too
            raise EngineUnavailableError(f"Engine '{self.id}' failed while loading '{name}': {answer}")
        raise AdapterLoadError(f"The engine refused '{name}': {answer}")

    async def remove(self, name: str) -> None:
        status, answer = await self._post("/lorikeet/remove", {"name": name})
        if status != 200:
            raise EngineError(f"Engine '{self.id}' did not free '{name}': {answer}")

    async def pin(self, name: str) -> None:
        status, answer = await self._post("/lorikeet/pin", {"name": name})
        if status != 200:
            raise AdapterLoadError(f"Engine '{self.id}': {answer}")

    async def adapters(self) -> EngineAdapters:
        status, body = await self._get("/lorikeet/adapters")
        if status != 200:
            raise EngineError(
                f"Engine '{self.id}' does not answer /lorikeet/adapters ({status}): its Python environment needs this "
                "project installed, and VLLM_PLUGINS has to name its plugin."
            )
        found = orjson.loads(body)["adapters"]
        return EngineAdapters(
            registered=frozenset(entry["name"] for entry in found if entry["registered"]),
            resident=frozenset(entry["name"] for entry in found if entry["resident"]),
        )

    async def produced(self, request_id: str) -> Produced | None:
        status, body = await self._get(f"/lorikeet/produced/{request_id}")
        return Produced(**orjson.loads(body)) if status == 200 else None

    async def healthy(self) -> bool:
        try:
            return (await self._get("/health"))[0] == 200
        except EngineUnavailableError:
            return False

    async def metrics(self) -> str:
        return (await self._get("/metrics"))[1].decode()

    async def close(self) -> None:
        if self._open_session is not None:
            await self._open_session.close()
            self._open_session = None

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_S), self._session.get(path) as response:
                return response.status, await response.read()
        except _LOST as exc:
            raise _unavailable(self.id, "cannot be reached", exc) from exc

    async def _post(self, path: str, body: Any, *, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[int, str]:
        """Status, and the text or error message of the answer."""
        try:
            async with asyncio.timeout(timeout_s), self.open(path, orjson.dumps(body)) as response:
                return response.status, _message(await response.read())
        except TimeoutError as exc:
            raise _unavailable(self.id, f"did not answer {path} in {timeout_s:g} s", exc) from exc


def _message(answer: bytes) -> str:
    try:
        return str(orjson.loads(answer)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer.decode(errors="replace")


def _unavailable(engine: str, what: str, cause: BaseException) -> EngineUnavailableError:
    """Callers read the message: the cause's own would tell them the path of our socket."""
    return EngineUnavailableError(f"Engine '{engine}' {what} ({type(cause).__name__}).")
