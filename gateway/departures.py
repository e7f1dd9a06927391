"""What happens to a deleted version: it leaves every engine when nobody uses it any more, and only then the disk.

Deleting the files of an adapter that an engine still knows kills that engine for everybody (FACTS: a load inside a step), so
the files wait until no engine lists the name and a grace period has passed.
"""

import asyncio
import logging
import shutil
from collections.abc import Iterable

from adapters.blobs import BlobStore
from adapters.errors import AdapterError
from adapters.home import Home
from adapters.merged_store import remove_merged_of
from adapters.registry import AdapterVersion, Registry
from gateway.errors import GatewayError
from gateway.fleet import Fleet

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 2.0  # while an engine is away or still lists the name


class Departures:
    """Sees deleted versions off, one after the other; `run` does the work."""

    def __init__(
        self, registry: Registry, blobs: BlobStore, home: Home, fleet: Fleet, storing: asyncio.Lock, *, grace_s: float
    ) -> None:
        """storing: held by whoever puts blobs and names them in the registry, so none is deleted between the two."""
        self._registry = registry
        self._blobs = blobs
        self._home = home
        self._fleet = fleet
        self._storing = storing
        self.grace_s = grace_s
        self.ask_again_s = ASK_AGAIN_S
        self._leaving: asyncio.Queue[AdapterVersion] = asyncio.Queue()

    def add(self, versions: Iterable[AdapterVersion]) -> None:
        """Versions the registry has just retired."""
        for version in versions:
            self._leaving.put_nowait(version)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                version = await self._leaving.get()
                group.create_task(self._see_off(version), name=f"departure {version.engine_name}")

    async def done(self) -> None:
        """Wait until everything added so far has left."""
        await self._leaving.join()

    async def _see_off(self, version: AdapterVersion) -> None:
        try:
            await self._leave_engines(version.engine_name)
            await asyncio.sleep(self.grace_s)
            async with self._storing:
                await asyncio.to_thread(self._remove_files, version)
            logger.info("adapter version removed", extra={"adapter": version.engine_name})
        except (AdapterError, OSError):  # left for the sweep of the next start
            logger.exception("files of a deleted version stay", extra={"adapter": version.engine_name})
        finally:
            self._leaving.task_done()

    async def _leave_engines(self, name: str) -> None:
        """Return when every engine has let go of the name. One that is away is waited for: it may come back with it."""
        for replica in self._fleet.replicas:
            while True:
                try:
                    if replica.ready:
                        await replica.residency.forget(name)
                        if name not in (await replica.engine.adapters()).registered:
                            break
                except GatewayError:
                    logger.info("engine away, departure waits", extra={"adapter": name, "engine": replica.id})
                await asyncio.sleep(self.ask_again_s)

    def _remove_files(self, version: AdapterVersion) -> None:
        shutil.rmtree(self._home.versions / version.engine_name, ignore_errors=True)
        remove_merged_of(self._home.merged, version)
        self.remove_blobs(version.files.values())

    def remove_blobs(self, digests: Iterable[str]) -> None:
        """Delete what no version names. Blocks; only for who holds `storing`."""
        for digest in self._registry.unnamed_files(digests):
            self._blobs.delete(digest)
