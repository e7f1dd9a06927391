"""Ask a served model over the OpenAI interface, a bounded number of requests at a time."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from trainer.data.chat import Row
from trainer.errors import EvaluationError

ATTEMPTS = 4  # a gateway that sheds load answers 429 or 503 and means "again shortly"
LONGEST_WAIT_S = 10.0
RETRIED = (429, 502, 503, 504)


@dataclass(frozen=True)
class Answer:
    text: str
    stopped: bool
    prompt_tokens: int = 0
    output_tokens: int = 0
    latency_s: float = 0.0  # of the attempt that was answered


class ChatClient:
    """One gateway and one key. transport: a stand-in for the network, for tests."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        tenant: str | None = None,
        timeout_s: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not key.isascii():
            raise EvaluationError("That is no API key: keys hold letters, digits, '-' and '_' only.")
        headers = {"authorization": f"Bearer {key}"} | ({"openai-project": tenant} if tenant else {})
        self.url = url.rstrip("/")
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5.0), transport=transport
            )
        except httpx.InvalidURL as exc:
            raise EvaluationError(f"{url} is no address: {exc}.") from exc

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def base_of(self, model: str) -> str:
        """The served name of the model's base. Raises EvaluationError."""
        found = await self._send("GET", f"/v1/models/{quote(model, safe='')}")
        return str(found.get("parent") or found["id"])

    async def answer(self, model: str, messages: Row, *, max_tokens: int) -> Answer:
        """Greedy. Raises EvaluationError."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        answer, latency_s = await self._timed("POST", "/v1/chat/completions", json=body)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            return Answer(
                str(choice["message"]["content"] or ""),
                choice["finish_reason"] == "stop",
                int(usage.get("prompt_tokens") or 0),
                int(usage.get("completion_tokens") or 0),
                latency_s,
            )
        except (LookupError, TypeError) as exc:
            raise EvaluationError(f"{self.url} answered '{model}' with something that is no chat completion.") from exc

    async def answers(
        self,
        model: str,
        prompts: Sequence[Row],
        *,
        max_tokens: int,
        concurrency: int,
        advance: Callable[[], None] = lambda: None,
        arrived: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer]:
        """In the order of the prompts. The first failure ends all. Raises EvaluationError.

        arrived: told of each answer as it comes, with its prompt's index.
        """
        slots = asyncio.Semaphore(concurrency)

        async def one(index: int, messages: Row) -> Answer:
            async with slots:
                answer = await self.answer(model, messages, max_tokens=max_tokens)
            arrived(index, answer)
            advance()
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
        except* EvaluationError as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def get(self, path: str) -> Any:
        """Raises EvaluationError."""
        return await self._send("GET", path)

    async def post(self, path: str, body: Any) -> Any:
        """Raises EvaluationError."""
        return await self._send("POST", path, json=body)

    async def _send(self, method: str, path: str, **arguments: Any) -> Any:
        return (await self._timed(method, path, **arguments))[0]

    async def _timed(self, method: str, path: str, **arguments: Any) -> tuple[Any, float]:
        for attempt in range(1, ATTEMPTS + 1):
            began_s = time.perf_counter()
            try:
                response = await self._http.request(method, path, **arguments)
            except httpx.ConnectError as exc:
                raise EvaluationError(f"No gateway answers at {self.url}. Start one with: lorikeet up") from exc
            except httpx.HTTPError as exc:
                raise EvaluationError(f"{self.url}{path} did not answer: {exc or type(exc).__name__}") from exc
            if response.status_code not in RETRIED or attempt == ATTEMPTS:
                break
            await asyncio.sleep(wait_s(response.headers.get("retry-after"), attempt))
        if response.is_error:
            raise EvaluationError(_refusal(response))
        try:
            return response.json(), time.perf_counter() - began_s
        except ValueError as exc:
            raise EvaluationError(f"{self.url}{path} did not answer in JSON.") from exc


def wait_s(retry_after: str | None, attempt: int) -> float:
    """What the gateway asks for, else doubling from half a second; never longer than LONGEST_WAIT_S."""
    try:
        wanted = float(retry_after) if retry_after else 0.5 * 2 ** (attempt - 1)
    except ValueError:
        wanted = 0.5 * 2 ** (attempt - 1)
    return min(max(wanted, 0.0), LONGEST_WAIT_S)


def _refusal(response: httpx.Response) -> str:
    try:
        return f"HTTP {response.status_code}: {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
