"""The canary: fixed prompts on the base model whose log-probabilities say whether an engine is still sane.

One request on weights that are not numbers leaves NaN in KV-cache blocks, and whoever is given such a block next may get
empty answers under status 200, while the engine's health stays green. Two things tell. The engine counts requests whose
logits held NaN: after eight of them the canary's own prompts passed three times in a row, and the next stranger was answered
with nothing, so a count that moves is enough to restart. And the base model's answers to fixed prompts change. Damage shows
in blocks that are partly filled (the masked rest of a block is multiplied by zero, and 0 · NaN is NaN), and vLLM hands out
first the partly filled block it freed last: a quick look at one short prompt lands there and costs the other streams next
to nothing. A thorough one adds longer prompts, whose last blocks come from the other end of the queue.
"""

import asyncio
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson

from adapters.home import Home
from gateway.engines.protocol import Engine
from gateway.errors import EngineError, EngineStalledError, EngineStartError
from gateway.probe import score
from gateway.settings import CanarySettings

logger = logging.getLogger(__name__)

_STORY = (
    "The lorikeet is a small bright parrot that lives in noisy flocks and feeds on nectar, pollen and soft fruit. "
    "In the morning the flock leaves its sleeping tree and follows the flowering gums along the river. By noon the "
    "birds rest in the shade, preen each other and call. In the evening they return in the thousands, and their voices "
    "can be heard from one end of the town to the other. "
)
PROMPTS = (_STORY[:60], _STORY, _STORY * 3)  # 14, 84 and 252 tokens: 1, 6 and 16 blocks of 16; 1, 1 and 2 of 128
QUICK = 1  # of them, the shortest
ANSWER_S = 60.0  # an engine that takes longer for a few hundred tokens answers nobody
LOOK_AGAIN_S = 0.5  # after a failed look
COUNTER_S = 1.0  # between two looks at the engine's own counter of corrupted requests, which costs nothing
_CORRUPTED = re.compile(r"^vllm:corrupted_requests_total(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)

Answers = tuple[tuple[float, ...], ...]  # one row of log-probabilities a prompt


class Watched(Protocol):
    """What the canary needs of a replica."""

    @property
    def id(self) -> str: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def ready(self) -> bool: ...

    def answered(self) -> None:
        """A real generation has just succeeded."""

    async def restart(self, reason: str) -> None: ...


@dataclass(frozen=True)
class CanaryResult:
    """One look. `difference`: largest mean difference of a prompt from its reference, in nats; None where not comparable."""

    ok: bool
    difference: float | None
    reason: str
    hopeless: bool = False  # not numbers at all, or silence: no second opinion needed


def judge(reference: Answers, seen: Answers, *, tolerance: float) -> CanaryResult:
    """Every prompt finite and near its reference?"""
    broken = [index for index, row in enumerate(seen) if not row or not all(map(math.isfinite, row))]
    if broken:
        reason = f"the base model's log-probabilities are not numbers ({len(broken)} of {len(seen)} prompts)"
        return CanaryResult(False, None, reason, hopeless=True)
    if [len(row) for row in seen] != [len(row) for row in reference]:
        return CanaryResult(False, None, "the base model reads the canary's prompts as other tokens than before")
    difference = max(
        sum(abs(a - b) for a, b in zip(row, wanted, strict=True)) / len(row)
        for row, wanted in zip(seen, reference, strict=True)
    )
    if difference > tolerance:
        return CanaryResult(
            False,
            difference,
            f"the base model's log-probabilities moved by {difference:.3f} nats (at most {tolerance:g})",
        )
    return CanaryResult(True, difference, "as before")


def corrupted_requests(metrics: str) -> float:
    """The engine's count, since its start, of requests whose logits held NaN; 0 where it does not count."""
    return sum(float(value) for value in _CORRUPTED.findall(metrics))


class Canary:
    """References of one base under one engine profile, and the looks that are compared with them."""

    def __init__(
        self, base_model: str, store: Path, settings: CanarySettings, *, failed: Callable[[str], None] = lambda _: None
    ) -> None:
        """base_model: the name the engine serves the base under. store: file of the references; see `reference_file`.

        failed: told the id of an engine each time it does not pass.
        """
        self._base_model = base_model
        self._store = store
        self._settings = settings
        self._failed = failed
        self._reference: Answers | None = None
        self._asking = asyncio.Lock()
        self.silent_s = ANSWER_S
        self.last: dict[str, CanaryResult] = {}  # by engine id, for status pages

    async def calibrate(self, engine: Engine) -> CanaryResult:
        """Take or confirm the references on an engine that has just started and has served nobody.

        Raises EngineStartError when its answers are no numbers or not those of earlier starts.
        """
        async with self._asking:
            if self._reference is None:
                self._reference = await asyncio.to_thread(_read, self._store)
            seen = await self._ask(engine)
            result = judge(self._reference or seen, seen, tolerance=self._settings.tolerance)
            if not result.ok:
                raise EngineStartError(
                    f"Engine '{engine.id}' started, but {result.reason}. If the engine or its libraries were changed on "
                    f"purpose, delete {self._store} and start again."
                )
            if self._reference is None:
                self._reference = seen
                await asyncio.to_thread(_write, self._store, seen)
        self.last[engine.id] = result
        return result

    async def check(self, engine: Engine, *, thorough: bool = True) -> CanaryResult:
        """One look. Raises EngineUnavailableError when the engine is away: no verdict."""
        if self._reference is None:
            return await self.calibrate(engine)
        prompts = len(PROMPTS) if thorough else QUICK
        try:
            seen = await self._ask(engine, prompts)
            result = judge(self._reference[:prompts], seen, tolerance=self._settings.tolerance)
        except EngineStalledError:
            result = CanaryResult(False, None, f"the base model gave no answer within {ANSWER_S:g} s")
        self.last[engine.id] = result
        return result

    async def watch(self, replica: Watched) -> None:
        """Look for ever: every second at the engine's count of corrupted requests, on a timer at its answers.

        Restarts an engine that has corrupted a request, answers the base with what is not a number, fails looks in a row, or
        has been silent for `silent_s`: one whose process ended is its supervisor's business, one that lives and hangs is not.
        """
        failures, next_look_s = 0, 0.0
        silent_since_s: float | None = None
        while True:
            await asyncio.sleep(min(LOOK_AGAIN_S if failures else COUNTER_S, self._settings.interval_s))
            if not replica.ready:
                failures, silent_since_s = 0, None
                continue
            asked_s = time.monotonic()
            try:
                corrupted = corrupted_requests(await replica.engine.metrics())
                if corrupted:
                    reason = f"{corrupted:.0f} requests met NaN, which stays in the cache for others"
                    result = CanaryResult(False, None, reason, hopeless=True)
                elif time.monotonic() < next_look_s:
                    silent_since_s = None
                    continue
                else:
                    result = await self.check(replica.engine, thorough=failures > 0)
            except EngineStartError as exc:
                result = CanaryResult(False, None, str(exc))
            except EngineError:
                silent_since_s = asked_s if silent_since_s is None else silent_since_s
                if time.monotonic() - silent_since_s < self.silent_s:
                    continue
                result = CanaryResult(False, None, f"it has been silent for {self.silent_s:g} s", hopeless=True)
            silent_since_s = None
            if result.ok:
                replica.answered()
                failures, next_look_s = 0, time.monotonic() + self._settings.interval_s
                continue
            failures += 1
            self._failed(replica.id)
            facts = {"engine": replica.id, "reason": result.reason, "failures": failures}
            logger.warning("canary failed", extra=facts)
            if result.hopeless or failures >= self._settings.failures:
                logger.error("engine restarted by the canary", extra=facts)
                failures = 0
                await replica.restart(f"canary: {result.reason}")

    async def _ask(self, engine: Engine, prompts: int = len(PROMPTS)) -> Answers:
        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(score(engine, self._base_model, prompt, timeout_s=ANSWER_S))
                    for prompt in PROMPTS[:prompts]
                ]
        except BaseExceptionGroup as exc:
            raise exc.exceptions[0] from None
        return tuple(tuple(task.result()) for task in asked)


def reference_file(home: Home, fingerprint: str, profile: str) -> Path:
    """Where the references of one base under one engine profile are kept, so that a later start is compared too."""
    key = hashlib.sha256(f"{fingerprint}\n{profile}\n{PROMPTS}".encode()).hexdigest()[:16]
    return home.models / ".canary" / f"{key}.json"


def _read(store: Path) -> Answers | None:
    """The kept references; None where there are none or the file is damaged."""
    try:
        rows = orjson.loads(store.read_bytes())["logprobs"]
        return tuple(tuple(float(value) for value in row) for row in rows)
    except (OSError, orjson.JSONDecodeError, LookupError, TypeError, ValueError):
        return None


def _write(store: Path, answers: Sequence[Sequence[float]]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    partial = store.with_suffix(".partial")
    partial.write_bytes(orjson.dumps({"prompts": PROMPTS, "logprobs": answers}))
    partial.replace(store)
