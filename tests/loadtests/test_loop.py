import asyncio
import socket
import threading
import time
from typing import Any

from loadtests.alarm import Alarm
from loadtests.loop import Waiting, running


def waiting() -> Waiting:
    found = running()
    assert found is not None
    return found


async def test_a_call_that_fails_is_told_and_keeps_no_other_from_being_made() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    made, later = asyncio.Event(), asyncio.Event()

    def fails() -> None:
        raise ValueError("by design")

    now_s = time.monotonic()
    waiting().call_at(now_s, fails)
    waiting().call_at(now_s, made.set)
    waiting().call_at(now_s + 2, later.set)
    await asyncio.wait_for(made.wait(), 5)
    assert not later.is_set()  # asyncio heard of it at once
    assert [str(context["exception"]) for context in told] == ["by design"]


async def test_after_an_alarm_is_left_none_of_its_calls_is_made() -> None:
    made: list[str] = []
    with Alarm(time.monotonic) as alarm:
        alarm.call_at(time.monotonic() + 0.05, lambda: made.append("of the alarm"))
    waiting().call_at(time.monotonic() + 0.1, lambda: made.append("another"))
    await asyncio.sleep(0.2)
    assert made == ["another"]


async def test_threads_timers_and_sockets_of_asyncio_are_served_while_there_are_calls() -> None:
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        waiting().call_at(time.monotonic() + 1e-4, again)

    again()
    loop = asyncio.get_running_loop()
    from_thread, by_timer = asyncio.Event(), asyncio.Event()
    threading.Timer(0.05, lambda: loop.call_soon_threadsafe(from_thread.set)).start()
    loop.call_later(0.05, by_timer.set)
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        threading.Timer(0.05, far.sendall, [b"x"]).start()
        async with asyncio.timeout(5):
            assert await loop.sock_recv(near, 1) == b"x"
            await from_thread.wait()
            await by_timer.wait()
    assert count > 10
