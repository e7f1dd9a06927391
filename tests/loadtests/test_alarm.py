import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.alarm import Alarm
from loadtests.client import run_clock
from loadtests.loop import new_event_loop


@pytest.mark.parametrize("loop_factory", [new_event_loop, asyncio.new_event_loop])
@settings(max_examples=20)
@given(instants=st.lists(st.floats(0.001, 0.03), max_size=12))
def test_sleepers_wake_in_the_order_of_their_instants_and_never_early(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], instants: list[float]
) -> None:
    async def wake_all() -> None:
        clock = run_clock()
        woken: list[float] = []
        late_s = [0.0]

        async def sleeper(at_s: float) -> None:
            await alarm.sleep_until(at_s)
            assert clock() >= at_s
            late_s.append(clock() - at_s)
            woken.append(at_s)

        with Alarm(clock) as alarm:
            tasks = [asyncio.create_task(sleeper(at_s)) for at_s in instants]
            await asyncio.gather(*tasks)
        assert sorted(woken) == sorted(instants)
        if max(late_s) < 0.001:  # on a busy machine instants may be over before anybody sleeps
            assert woken == sorted(woken)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(wake_all())


async def test_a_sleeper_that_is_cancelled_keeps_nobody_else_from_waking() -> None:
    clock = run_clock()
    with Alarm(clock) as alarm:
        gone = asyncio.create_task(alarm.sleep_until(0.05))
        stays = asyncio.create_task(alarm.sleep_until(0.1))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait_for(stays, 5)
        assert clock() >= 0.1
        await asyncio.wait_for(alarm.sleep_until(0.15), 5)  # and the timer still works


async def test_an_earlier_sleeper_is_not_kept_waiting_by_one_that_came_before() -> None:
    clock = run_clock()
    with Alarm(clock) as alarm:
        late = asyncio.create_task(alarm.sleep_until(60))
        await asyncio.sleep(0)
        await asyncio.wait_for(alarm.sleep_until(0.05), 5)
        late.cancel()
