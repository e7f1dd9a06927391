import time

import pytest

from gateway.admission import Admission, Scheduler
from gateway.breaker import Breaker
from gateway.engines.echo import EchoEngine
from gateway.errors import (
    AdapterLoadError,
    EngineAnswerError,
    EngineStalledError,
    EngineUnavailableError,
    NoReplicaError,
    OverloadedError,
)
from gateway.fleet import Fleet, Replica
from gateway.relay import StreamBrokenError
from gateway.residency import Residency
from gateway.settings import ResidencySettings
from tests.gateway.conftest import EchoHost


async def nothing(_: object) -> None:
    """Nothing to restore."""


def replica(name: str = "echo", *, state: str = "ready") -> Replica:
    """One whose breaker opens at the first failure."""
    scheduler = Scheduler(slots=1, max_in_flight=4, patience_s=1.0)
    return Replica(
        EchoHost(EchoEngine, nothing, name, state=state),
        Residency(nothing, list, capacity=4, settings=ResidencySettings()),  # type: ignore[arg-type]  # nothing is fetched
        Admission(scheduler, max_queue=4, tenant_queue=4, longest_wait_s=1.0),
        Breaker(failures=1, open_s=60.0),
        slots=2,
    )


async def fail(one: Replica, error: Exception) -> None:
    async with one.asked():
        raise error


@pytest.mark.parametrize("error", [EngineUnavailableError("gone"), EngineStalledError(1.0)])
async def test_an_engine_that_breaks_off_or_falls_silent_is_left_alone(error: Exception) -> None:
    one = replica()
    with pytest.raises(type(error)):
        await fail(one, error)
    assert one.ready
    assert not one.available
    with pytest.raises(NoReplicaError):
        await fail(one, error)


async def test_a_failure_within_a_stream_counts_as_what_broke_it() -> None:
    one = replica()
    broken = StreamBrokenError()
    broken.__cause__ = EngineUnavailableError("gone")
    with pytest.raises(StreamBrokenError):
        await fail(one, broken)
    assert not one.available


@pytest.mark.parametrize(
    "error", [EngineAnswerError(400, "too long"), EngineAnswerError(500, "odd request"), AdapterLoadError("refused")]
)
async def test_what_a_healthy_engine_refuses_is_not_held_against_it(error: Exception) -> None:
    one = replica()
    with pytest.raises(type(error)):
        await fail(one, error)
    assert one.available


async def test_a_500_of_an_engine_that_is_dead_inside_is_its_own_end() -> None:
    one = replica()
    assert isinstance(one.engine, EchoEngine)
    one.engine.die_inside()
    with pytest.raises(EngineUnavailableError):
        await fail(one, EngineAnswerError(500, "EngineCore encountered an issue."))
    assert not one.available


async def test_only_a_generation_proves_that_an_engine_generates() -> None:
    one = replica()
    async with one.asked(generation=False):
        pass
    assert not one.proven(60.0)
    async with one.asked():
        pass
    assert one.proven(60.0)
    assert not one.proven(0.0)


async def test_one_that_has_just_failed_a_request_is_asked_again_when_no_other_comes() -> None:
    fleet = Fleet((replica("a"),), max_waiting=4)
    found = await fleet.available(None, until_s=time.monotonic() + 30, failed={"a"})
    assert found.id == "a"
    assert fleet.waiting == 0


async def test_nobody_waits_for_an_engine_that_will_not_come() -> None:
    fleet = Fleet((replica(state="failed"),), max_waiting=4)
    with pytest.raises(NoReplicaError):
        await fleet.available(None, until_s=time.monotonic() + 3600)


async def test_those_who_wait_for_an_engine_are_bounded_too() -> None:
    fleet = Fleet((replica(state="restarting"),), max_waiting=0)
    with pytest.raises(OverloadedError):
        await fleet.available(None, until_s=time.monotonic() + 3600)
