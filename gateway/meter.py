"""What one request is charged and what its time went on: filled in on its way, a ledger entry at its end."""

import asyncio
import contextlib
import time
from dataclasses import dataclass

from adapters.ledger import Entry
from gateway.engines.protocol import Engine
from gateway.errors import EngineError, EngineUnavailableError, GatewayError
from gateway.relay import Outcome

IN_PROGRESS = "in_progress"  # the outcome of what has not ended
COUNT_S = 0.3  # longest wait for an engine's count of a request that is about to be cut: the abort waits meanwhile


@dataclass
class Meter:
    """One request. Moments are seconds on the monotonic clock; None: it has not come to that."""

    request_id: str
    route: str
    tenant: str
    key_id: str
    model: str  # `owner/adapter`, or the base model's name
    version: int | None
    requested: str
    stream: bool
    prompt_tokens_estimate: int
    outcome: Outcome
    arrived_s: float
    engine: Engine | None = None  # the last that it was sent to
    queued_s: float | None = None
    admitted_s: float | None = None
    loaded_s: float | None = None
    sent_s: float | None = None

    def sent(self, engine: Engine, outcome: Outcome) -> None:
        """To an engine; a second time when the first one failed."""
        self.engine, self.outcome, self.sent_s = engine, outcome, outcome.sent_s

    def entry(self, ended: str | None = None) -> Entry:
        """ended: its outcome; None while it is on its way."""
        now_s, result = time.monotonic(), self.outcome
        return Entry(
            request_id=self.request_id,
            received_ms=int((time.time() - now_s + self.arrived_s) * 1000),
            route=self.route,
            tenant=self.tenant,
            key_id=self.key_id,
            model=self.model,
            version=self.version,
            requested=self.requested,
            replica=self.engine.id if self.engine else None,
            stream=self.stream,
            outcome=ended or IN_PROGRESS,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=result.cached_tokens,
            output_tokens=result.completion_tokens if result.counted else result.events,
            estimated=self._estimated,
            queued_s=self._after(self.queued_s),
            admitted_s=self._after(self.admitted_s),
            loaded_s=self._after(self.loaded_s),
            sent_s=self._after(self.sent_s),
            first_s=self._after(result.first_s),
            last_s=self._after(result.last_s),
            ended_s=self._after(now_s if ended else None),
        )

    async def count(self) -> None:
        """Ask the engine what it made so far, for an answer that is about to be cut before its usage came.

        Asked before the connection is closed: afterwards it knows no more. One that is dead or slow does not say.
        """
        result = self.outcome
        if self.engine is None or result.counted:
            return
        with contextlib.suppress(GatewayError, TimeoutError):
            async with asyncio.timeout(COUNT_S):
                produced = await self.engine.produced(self.request_id)
            if produced is not None and not result.counted:
                result.prompt_tokens, result.cached_tokens = produced.prompt_tokens, produced.cached_tokens
                result.completion_tokens = max(result.events, produced.output_tokens)
                result.counted = True

    async def count_cut(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        """For an exit stack, above the engine's connection. An engine that is gone, or refused the request, is not asked."""
        gone = isinstance(exc, EngineUnavailableError)
        refused = isinstance(exc, EngineError) and not self.outcome.events
        if exc is not None and not gone and not refused:
            await self.count()

    @property
    def _estimated(self) -> bool:
        """Output was seen, and nobody can be asked how many tokens it and its prompt were."""
        return not self.outcome.counted and self.outcome.events > 0

    @property
    def _prompt_tokens(self) -> int:
        return self.prompt_tokens_estimate if self._estimated else self.outcome.prompt_tokens

    def _after(self, moment_s: float | None) -> float | None:
        return None if moment_s is None else round(moment_s - self.arrived_s, 6)
