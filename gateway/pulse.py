"""How late the event loop is: whoever holds it holds every stream."""

import asyncio
import time
from collections.abc import Callable

BEAT_S = 0.1


async def beat(tell: Callable[[float], None]) -> None:
    """For ever: sleep a moment and tell by how many seconds the waking was late."""
    while True:
        began_s = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        tell(max(0.0, time.perf_counter() - began_s - BEAT_S))
