"""The canary notices an engine that has gone bad, and only that."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters.home import Home
from gateway.canary import Canary, corrupted_requests, judge, reference_file
from gateway.engines.echo import EchoEngine
from gateway.errors import EngineStartError, EngineUnavailableError
from gateway.settings import CanarySettings

SETTINGS = CanarySettings(interval_s=0.01)


@dataclass
class EchoReplica:
    """A replica whose restart makes the engine fresh, or does not."""

    engine: EchoEngine
    heals: bool = True
    ready: bool = True
    reasons: list[str] = field(default_factory=list)
    id: str = "echo"
    answers: int = 0

    def answered(self) -> None:
        self.answers += 1

    async def restart(self, reason: str) -> None:
        self.reasons.append(reason)
        if self.heals:
            self.engine.restart()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return reference_file(Home(tmp_path), "weights", "test")


@asynccontextmanager
async def watching(store: Path, replica: EchoReplica, settings: CanarySettings = SETTINGS) -> AsyncIterator[Canary]:
    canary = Canary("base", store, settings)
    await canary.calibrate(replica.engine)
    watch = asyncio.create_task(canary.watch(replica))
    try:
        yield canary
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_equal_answers_pass_and_moved_ones_fail_with_the_number() -> None:
    assert judge(((-1.0, -2.0),), ((-1.0, -2.2),), tolerance=0.5).ok
    result = judge(((-1.0, -2.0),), ((-2.0, -3.0),), tolerance=0.5)
    assert (result.ok, result.difference) == (False, 1.0)
    assert "1.000 nats" in result.reason


@pytest.mark.parametrize("broken", [(math.nan,), (math.inf, -1.0), ()])
def test_what_is_not_a_number_is_poison(broken: tuple[float, ...]) -> None:
    result = judge(((-1.0,), (-1.0,)), ((-1.0,), broken), tolerance=0.5)
    assert not result.ok
    assert result.hopeless


def test_one_bad_prompt_among_good_ones_is_enough() -> None:
    assert not judge(((-1.0,), (-1.0,)), ((-1.0,), (-3.0,)), tolerance=0.5).ok


def test_other_tokens_than_before_cannot_be_compared() -> None:
    result = judge(((-1.0, -2.0),), ((-1.0,),), tolerance=0.5)
    assert not result.ok
    assert result.difference is None


def test_the_count_of_corrupted_requests_is_read_from_the_metrics() -> None:
    text = "# TYPE vllm:corrupted_requests_total counter\n"
    text += 'vllm:corrupted_requests_total{engine="0",model_name="base"} 3.0\n'
    assert corrupted_requests(text) == 3
    assert corrupted_requests("vllm:corrupted_requests_created 1.7e9\n") == 0


async def test_references_outlive_the_process_and_a_changed_engine_does_not_start(store: Path) -> None:
    await Canary("base", store, SETTINGS).calibrate(EchoEngine())
    assert (await Canary("base", store, SETTINGS).calibrate(EchoEngine())).difference == 0
    changed = EchoEngine()
    changed.base = changed.base.__class__("base", "other weights", b"another seed")
    with pytest.raises(EngineStartError, match="delete"):
        await Canary("base", store, SETTINGS).calibrate(changed)


async def test_an_engine_poisoned_from_the_start_is_no_reference(store: Path) -> None:
    engine = EchoEngine()
    engine.poison()
    with pytest.raises(EngineStartError, match="not numbers"):
        await Canary("base", store, SETTINGS).calibrate(engine)
    assert not store.exists()  # noqa: ASYNC240


async def test_a_damaged_reference_file_is_taken_anew(store: Path) -> None:
    store.parent.mkdir(parents=True)
    store.write_text("{broken")  # noqa: ASYNC240
    await Canary("base", store, SETTINGS).calibrate(EchoEngine())
    assert b"logprobs" in store.read_bytes()  # noqa: ASYNC240


async def test_a_look_sees_poison_and_the_next_one_the_cure(store: Path) -> None:
    canary, engine = Canary("base", store, SETTINGS), EchoEngine()
    await canary.calibrate(engine)
    engine.poison()
    assert (await canary.check(engine)).hopeless
    engine.restart()
    assert (await canary.check(engine)).ok
    assert canary.last["echo"].ok


async def test_a_quick_look_asks_one_prompt_and_a_thorough_one_all(store: Path) -> None:
    canary, engine = Canary("base", store, SETTINGS), EchoEngine()
    await canary.calibrate(engine)
    engine.requests.clear()
    await canary.check(engine, thorough=False)
    assert len(engine.requests) == 1
    await canary.check(engine)
    assert len(engine.requests) > 2


async def test_a_dead_engine_is_no_verdict(store: Path) -> None:
    canary, engine = Canary("base", store, SETTINGS), EchoEngine()
    await canary.calibrate(engine)
    engine.die()
    with pytest.raises(EngineUnavailableError):
        await canary.check(engine)


async def test_a_poisoned_engine_is_restarted_once_and_then_left_alone(store: Path) -> None:
    replica = EchoReplica(EchoEngine())
    async with watching(store, replica) as canary:
        replica.engine.poison()
        await until(lambda: bool(replica.reasons))
        await until(lambda: canary.last["echo"].ok)
        await asyncio.sleep(0.1)
    assert len(replica.reasons) == 1
    assert "NaN" in replica.reasons[0]


async def test_an_engine_whose_answers_moved_is_restarted_after_failures_in_a_row(store: Path) -> None:
    replica = EchoReplica(EchoEngine(), heals=False)
    async with watching(store, replica, CanarySettings(interval_s=0.01, failures=3)):
        healthy = replica.engine.base
        replica.engine.base = healthy.__class__("base", "", b"other")
        await until(lambda: bool(replica.reasons))
        replica.engine.base = healthy
    assert "moved" in replica.reasons[0]


async def test_a_healthy_engine_is_never_restarted(store: Path) -> None:
    replica = EchoReplica(EchoEngine())
    async with watching(store, replica) as canary:
        canary.last.clear()
        await until(lambda: "echo" in canary.last)
        await asyncio.sleep(0.1)
    assert replica.reasons == []


async def test_an_engine_that_is_away_is_not_restarted_a_second_time(store: Path) -> None:
    replica = EchoReplica(EchoEngine())
    async with watching(store, replica):
        replica.engine.die()
        await asyncio.sleep(0.1)
        replica.ready = False
        await asyncio.sleep(0.05)
    assert replica.reasons == []


@pytest.mark.parametrize("silence", [EchoEngine.die, EchoEngine.die_inside])
async def test_an_engine_that_lives_and_stays_silent_is_restarted(
    store: Path, silence: Callable[[EchoEngine], None]
) -> None:
    replica = EchoReplica(EchoEngine())
    async with watching(store, replica) as canary:
        canary.silent_s = 0.1
        silence(replica.engine)
        await until(lambda: bool(replica.reasons))
        await until(lambda: canary.last["echo"].ok)
        await asyncio.sleep(0.2)
    assert len(replica.reasons) == 1
    assert "silent" in replica.reasons[0]
