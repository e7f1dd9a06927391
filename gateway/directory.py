"""What the hot path knows of the registry: one immutable snapshot, renewed when the registry's change counter moves."""

import asyncio
import logging

from adapters.registry import Registry, Snapshot

logger = logging.getLogger(__name__)


class Directory:
    """Holds the newest snapshot. Reading it is a plain attribute access; `follow` and `refresh` renew it."""

    def __init__(self, registry: Registry, snapshot: Snapshot) -> None:
        self._registry = registry
        self._lock = asyncio.Lock()
        self.snapshot = snapshot

    @classmethod
    async def open(cls, registry: Registry) -> "Directory":
        return cls(registry, await asyncio.to_thread(registry.snapshot))

    async def refresh(self) -> Snapshot:
        """See every change committed before this call; called after each change made in this process."""
        async with self._lock:
            if await asyncio.to_thread(self._registry.change_counter) != self.snapshot.counter:
                self.snapshot = await asyncio.to_thread(self._registry.snapshot)
            return self.snapshot

    async def follow(self, every_s: float) -> None:
        """Renew for ever. A database that is briefly away leaves the last snapshot in force."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception:
                logger.warning("registry unreachable, serving from the last snapshot", exc_info=True)
