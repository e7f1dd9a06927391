import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from loadtests.loop import new_event_loop
from tests.loadtests.server import FakeServer, serving


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that runs load tests; where a test is about it, on the usual one too."""
    return {"ours": new_event_loop}


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    """In the test's own event loop."""
    async with serving(FakeServer()) as running:
        yield running


@pytest.fixture
def threaded_server() -> Iterator[FakeServer]:
    """In a thread, for commands that bring an event loop of their own."""
    fake = FakeServer()
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(fake):
            ready.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
