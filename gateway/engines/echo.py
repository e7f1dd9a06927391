"""A stand-in for vLLM inside the process: the same HTTP bodies, the same slots, the same ways to fail, no model.

An adapter's folder may hold, beside its weights, files that only this engine reads:
  echo.txt         the whole answer
  echo-no-effect   its log-probabilities are the base model's
  echo-nan         its log-probabilities are not numbers; generating with it poisons the engine, as it does vLLM
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import orjson

from gateway.engines import echo_answers as answers
from gateway.engines.echo_answers import Answer, BadRequestError, Json, Voice
from gateway.engines.protocol import EngineAdapters, Produced
from gateway.errors import AdapterLoadError, EngineUnavailableError, EngineUnreachableError

GENERATION = {
    "/v1/chat/completions": (answers.chat_body, answers.chat_events, "chatcmpl", 10_000),
    "/v1/completions": (answers.completion_body, answers.completion_events, "cmpl", 16),
    "/v1/responses": (lambda answer, _body: answers.response_body(answer), answers.response_events, "resp", 10_000),
}
_NAN_MESSAGE = "Out of range float values are not JSON compliant: nan"
_DEAD_MESSAGE = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass(frozen=True)
class SeenRequest:
    """What reached the engine."""

    path: str
    body: Json
    headers: Mapping[str, str]


@dataclass
class EchoResponse:
    """An answer being received. Streams are made as they are read."""

    status: int
    content_type: str
    _parts: AsyncIterator[bytes]

    async def read(self) -> bytes:
        return b"".join([part async for part in self._parts])

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        async for part in self._parts:
            yield part


def read_voice(name: str, folder: Path, base: Voice) -> Voice:
    """What an adapter's folder makes this engine say. Raises AdapterLoadError where vLLM would refuse the folder."""
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not weights.is_file():
        raise AdapterLoadError(f"The engine refused '{name}': no adapter found in {folder}.")
    fixed = folder / "echo.txt"
    return Voice(
        name=name,
        text=fixed.read_text(encoding="utf-8").strip() if fixed.is_file() else f"I am {name} and this is my answer.",
        seed=base.seed if (folder / "echo-no-effect").exists() else hashlib.sha256(weights.read_bytes()).digest(),
        nan=(folder / "echo-nan").exists(),
    )


class EchoEngine:
    """Implements `protocol.Engine`. Tests read its attributes, and break it with the methods that follow `close`."""

    def __init__(
        self,
        id: str = "echo",  # noqa: A002
        *,
        slots: int = 2,
        token_s: float = 0.0,
        load_s: float = 0.0,
        base: str = "base",
        context_tokens: int = 2048,
    ) -> None:
        """token_s: pause before each event; load_s: how long a load takes, during which every stream stands still."""
        self.id = id
        self.slots = slots
        self.token_s = token_s
        self.load_s = load_s
        self.base = Voice(base, "I am the base model.", b"")
        self.context_tokens = context_tokens
        self.started = self.finished = self.aborted = self.loads = self.removed = 0
        self.over_slots = 0  # requests that had to wait because the adapters before them held every slot
        self.requests: deque[SeenRequest] = deque(maxlen=10_000)
        self.pinned: set[str] = set()
        self.voices: dict[str, Voice] = {}
        self.in_flight: dict[str, int] = {}  # engine name -> requests generating now
        self._runs: dict[str, _Run] = {}  # by x-request-id
        self._refused: set[str] = set()
        self._poisoned = self._dead = self._core_dead = False
        self._slot_freed = asyncio.Event()
        self._step = asyncio.Lock()  # vLLM's step thread: a load keeps it, every token needs it
        self._awake = asyncio.Event()
        self._awake.set()
        self._random = Random(0)  # noqa: S311

    @asynccontextmanager
    async def open(
        self, path: str, body: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[EchoResponse]:
        if self._dead:
            raise EngineUnreachableError(f"Engine '{self.id}' cannot be reached.")
        request: Json = orjson.loads(body)
        self.requests.append(SeenRequest(path, request, dict(headers or {})))
        voice = self._voice(str(request.get("model") or self.base.name))
        if path not in (*GENERATION, "/tokenize"):
            yield _json(404, answers.error_object("Not Found", "NotFoundError", 404))
        elif voice is None:
            message = f"The model `{request['model']}` does not exist."
            yield _json(404, answers.error_object(message, "NotFoundError", 404, "model"))
        elif self._core_dead:
            yield _json(500, answers.error_object(_DEAD_MESSAGE, "InternalServerError", 500))
        else:
            try:
                if path == "/tokenize":
                    ids = answers.prompt_token_ids(request)
                    count = {"count": len(ids), "max_model_len": self.context_tokens}
                    yield _json(200, count | {"tokens": ids, "token_strs": None})
                    return
                answer = self._answer(path, request, voice, (headers or {}).get("X-Request-Id"))
            except BadRequestError as exc:
                yield _json(400, answers.error_object(str(exc), "BadRequestError", 400, exc.param))
                return
            async with self._running(voice, answer, (headers or {}).get("x-request-id", answer.id)) as run:
                yield await self._respond(path, request, answer, run)

    async def load(self, name: str, folder: Path) -> None:
        self._check_alive()
        if name in self._refused:
            raise AdapterLoadError(f"The engine refused '{name}'.")
        if name in self.voices:
            return
        voice = await asyncio.to_thread(read_voice, name, folder, self.base)
        async with self._step:
            await asyncio.sleep(self.load_s)
            self._check_alive()
            self.voices[name] = voice
            self.loads += 1

    async def remove(self, name: str) -> None:
        self._check_alive()
        self.pinned.discard(name)
        if self.voices.pop(name, None) is not None:
            self.removed += 1

    async def pin(self, name: str) -> None:
        self._check_alive()
        if name not in self.voices:
            raise AdapterLoadError(f"'{name}' cannot be pinned: the engine does not hold it.")
        self.pinned.add(name)

    async def adapters(self) -> EngineAdapters:
        self._check_alive()
        return EngineAdapters(registered=frozenset(self.voices), resident=frozenset(self.voices))

    async def produced(self, request_id: str) -> Produced | None:
        self._check_alive()
        run = self._runs.get(request_id)
        return Produced(run.prompt_tokens, 0, run.output_tokens) if run is not None else None

    async def healthy(self) -> bool:
        return not (self._dead or self._core_dead)

    async def metrics(self) -> str:
        self._check_alive()
        labels = f'{{engine="0",model_name="{self.base.name}"}}'
        running = sum(self.in_flight.values())
        return (
            f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{labels} {float(running)}\n"
            f"# TYPE vllm:corrupted_requests_total counter\n"
            f"vllm:corrupted_requests_total{labels} {1.0 if self._poisoned else 0.0}\n"
        )

    async def close(self) -> None:
        """Nothing is open."""

    def die(self) -> None:
        """The process is gone: connections break, new ones are refused."""
        self._dead = True
        self._awake.set()
        self._notify()

    def die_inside(self) -> None:
        """vLLM's EngineCore is gone, its HTTP side is not yet: streams end with an error event and then [DONE]."""
        self._core_dead = True
        self._awake.set()

    def poison(self) -> None:
        """From now on answers are empty with status 200 and log-probabilities refused, as after NaN in the cache."""
        self._poisoned = True

    def refuse(self, name: str) -> None:
        """Answer the next loads of this name as vLLM answers an adapter it cannot load."""
        self._refused.add(name)

    def stall(self) -> None:
        """Send no further event until `wake`."""
        self._awake.clear()

    def wake(self) -> None:
        self._awake.set()

    def restart(self) -> None:
        """A new process under the same id: healthy, and holding nothing."""
        self._dead = self._core_dead = self._poisoned = False
        self._awake.set()
        self.voices.clear()
        self.pinned.clear()

    def _check_alive(self) -> None:
        if self._dead:
            raise EngineUnavailableError(f"Engine '{self.id}' cannot be reached.")

    def _voice(self, name: str) -> Voice | None:
        return self.base if name == self.base.name else self.voices.get(name)

    def _answer(self, path: str, request: Json, voice: Voice, request_id: str | None) -> Answer:
        _, _, prefix, default_tokens = GENERATION[path]
        answer = answers.answer_of(
            f"{prefix}-{request_id or self.started}",
            voice,
            request,
            default_tokens=default_tokens,
            context_tokens=self.context_tokens,
        )
        self._poisoned = self._poisoned or voice.nan
        if not self._poisoned:
            return answer
        if request.get("logprobs") is not None or request.get("prompt_logprobs") is not None:
            raise BadRequestError(_NAN_MESSAGE)
        return Answer(answer.id, voice, (), "length", answer.prompt_tokens)

    @asynccontextmanager
    async def _running(self, voice: Voice, answer: Answer, request_id: str) -> AsyncIterator["_Run"]:
        """Count the request; leaving before the last event was made counts as aborted."""
        self.started += 1
        run = self._runs[request_id] = _Run(answer.prompt_tokens)
        try:
            yield run
        finally:
            self._runs.pop(request_id, None)
            if run.holds_slot:
                self._leave(voice)
            if run.done:
                self.finished += 1
            else:
                self.aborted += 1

    async def _respond(self, path: str, request: Json, answer: Answer, run: "_Run") -> EchoResponse:
        body, events, _, _ = GENERATION[path]
        if request.get("stream"):
            return EchoResponse(
                200, "text/event-stream; charset=utf-8", self._stream(events(answer, request), answer, run)
            )
        await self._enter(answer.voice, run)
        for _ in answer.tokens:
            await self._next_step()
            run.output_tokens += answer.choices
        run.done = True
        if self._core_dead:
            return _json(500, answers.error_object(_DEAD_MESSAGE, "InternalServerError", 500))
        return _json(200, body(answer, request))

    async def _stream(self, events: Iterator[bytes], answer: Answer, run: "_Run") -> AsyncIterator[bytes]:
        await self._enter(answer.voice, run)
        for event in events:
            await self._next_step()
            if self._core_dead:
                run.done = True
                yield answers.sse(answers.error_object(_DEAD_MESSAGE, "InternalServerError", 500))
                yield answers.sse("[DONE]")
                return
            run.done = run.done or answers.is_last_word(event)
            run.output_tokens += answers.has_word(event)
            cut = self._random.randrange(len(event))
            for part in filter(None, (event[:cut], event[cut:])):
                yield part

    async def _next_step(self) -> None:
        await asyncio.sleep(self.token_s)
        await self._awake.wait()
        async with self._step:
            self._check_alive()

    async def _enter(self, voice: Voice, run: "_Run") -> None:
        """Take a LoRA slot. An adapter beyond the slots waits until one of the others has no request left."""
        name = voice.name
        if not self._admits(name):
            self.over_slots += 1
        while not self._admits(name):
            await self._slot_freed.wait()
            self._check_alive()
        self.in_flight[name] = self.in_flight.get(name, 0) + 1
        run.holds_slot = True

    def _admits(self, name: str) -> bool:
        adapters = self.in_flight.keys() - {self.base.name}
        return name == self.base.name or name in adapters or len(adapters) < self.slots

    def _leave(self, voice: Voice) -> None:
        self.in_flight[voice.name] -= 1
        if not self.in_flight[voice.name]:
            del self.in_flight[voice.name]
        self._notify()

    def _notify(self) -> None:
        """Let everyone who waits for a slot look again."""
        self._slot_freed.set()
        self._slot_freed = asyncio.Event()


@dataclass
class _Run:
    """Where one request is."""

    prompt_tokens: int
    output_tokens: int = 0
    holds_slot: bool = False
    done: bool = False


def _json(status: int, body: Json) -> EchoResponse:
    async def parts() -> AsyncIterator[bytes]:
        yield orjson.dumps(body)

    return EchoResponse(status, "application/json", parts())
