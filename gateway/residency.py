"""What one engine holds: leases, single-flight paced loads, eviction, retirement, and agreement with the engine's own list.

A version's files are brought onto the disk and into the page cache before the engine hears of it, since a load stops every
running stream for as long as it takes. A version leaves the engine only when no request holds a lease on it.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from adapters.errors import AdapterError
from adapters.registry import AdapterVersion
from gateway.engines.protocol import Engine
from gateway.errors import AdapterLoadError, EngineUnavailableError, GatewayError, NoReplicaError
from gateway.metrics import Metrics
from gateway.settings import ResidencySettings
from gateway.tasks import Tasks

logger = logging.getLogger(__name__)

LOADS = (
    16  # a load first waits for the engine's step to end: the quickest of so many tells how long one stops the streams
)
DEADLY = 2  # once may be chance: somebody else's crash, or a restart

Fetch = Callable[[AdapterVersion], Awaitable[Path]]  # brings a version's folder onto this machine's disk
Production = Callable[[], Iterable[AdapterVersion]]  # versions that an alias points at now, most wanted first


@dataclass(frozen=True)
class Held:
    """An engine that answers to the version for as long as the lease lasts."""

    engine: Engine
    load_s: float  # what this request waited for a load; 0 when the version was resident


class Residency:
    """One engine's adapters. `restore` hands it a started engine."""

    def __init__(
        self,
        fetch: Fetch,
        production: Production,
        *,
        capacity: int,
        settings: ResidencySettings,
        metrics: Metrics | None = None,
    ) -> None:
        """capacity: adapters the engine keeps in host memory; more would be read from disk in the middle of a step."""
        self._fetch = fetch
        self._production = production
        self._capacity = capacity
        self._settings = settings
        self._metrics = metrics or Metrics.create()
        self._engine: Engine | None = None
        self._claims: Counter[str] = Counter()  # leases, and those who wait for their turn to take one
        self._leases: Counter[str] = Counter()
        self._loaded: OrderedDict[str, AdapterVersion] = OrderedDict()  # least recently used first
        self._used_s: dict[str, float] = {}
        self._deaths: Counter[str] = Counter()  # how often the engine went away while the name was loaded
        self._locks = WeakValueDictionary[str, asyncio.Lock]()  # each for as long as somebody holds or wants it
        self._loading = asyncio.Lock()  # one load at a time: each stops the engine's streams
        self._next_load_s = 0.0
        self._load_times = deque[float](maxlen=LOADS)
        self._released = asyncio.Event()  # set, and replaced, when the last claim on a name ends
        self._wanted: dict[str, AdapterVersion] = {}  # by requests that wait for a turn, the longest waiting first
        self._loading_ahead = False
        self._tasks = Tasks()

    @property
    def claimed(self) -> int:
        """Engine names that requests hold, or wait to hold."""
        return len(self._claims)

    @property
    def resident(self) -> list[str]:
        """Engine names, least recently used first."""
        return list(self._loaded)

    async def restore(self, engine: Engine) -> None:
        """Bring a fresh engine to what the last one held and production needs. Called before it takes requests.

        A version that cannot be fetched or loaded is left out: one tenant's adapter must not keep the engine from all.
        Raises EngineUnavailableError when the engine goes away meanwhile.
        """
        wanted = {version.engine_name: version for version in self._production()}
        wanted |= {name: version for name, version in self._loaded.items() if self._leases[name]}
        self._loaded.clear()
        self._engine = engine
        for version in list(wanted.values())[: self._capacity]:
            with _without_the_broken(version):
                await self._load(engine, version, await self._fetch(version))

    @contextmanager
    def claim(self, version: AdapterVersion) -> Iterator[None]:
        """Keep the version from being forgotten, loaded or not: for a request that waits for its turn to hold it."""
        name = version.engine_name
        self._claims[name] += 1
        try:
            yield
        finally:
            self._claims[name] -= 1
            if not self._claims[name]:
                del self._claims[name]
                self._wanted.pop(name, None)
                self._released.set()
                self._released = asyncio.Event()
                self._load_ahead()

    @asynccontextmanager
    async def hold(self, version: AdapterVersion) -> AsyncIterator[Held]:
        """Lease the version: loaded before the body runs, not removed before it ends.

        Raises NoReplicaError without an engine, AdapterLoadError or EngineUnavailableError when the load fails.
        """
        name = version.engine_name
        with self.claim(version):
            self._leases[name] += 1
            try:
                load_s = 0.0
                self._note_lookup(hit=name in self._loaded)
                if name not in self._loaded:
                    started_s = time.monotonic()
                    await self._ensure(version)
                    load_s = time.monotonic() - started_s
                self._touch(name)
                if self._engine is None:
                    raise NoReplicaError
                yield Held(self._engine, load_s)
            finally:
                self._touch(name)
                self._leases[name] -= 1
                if not self._leases[name]:
                    del self._leases[name]

    def want(self, version: AdapterVersion) -> None:
        """A request that claims the version waits for its turn: load it meanwhile, or its slot stands empty during the load.

        Only where that pushes out nothing that another request claims.
        """
        if version.engine_name not in self._loaded:
            self._wanted.setdefault(version.engine_name, version)
            self._load_ahead()

    async def forget(self, name: str) -> None:
        """Wait until nobody claims the engine name, then free it in the engine."""
        while self._claims[name]:
            await self._released.wait()
        await self._remove(name)

    def mark_missing(self, name: str) -> None:
        """The engine answered that it does not know the name: the next lease loads it again."""
        self._loaded.pop(name, None)

    async def sweep(self) -> None:
        """Free what is idle and no longer production; warm what production needs and is not loaded."""
        self._forget_use()
        production = {version.engine_name: version for version in self._production()}
        now_s = time.monotonic()
        for name in self.resident:
            idle_s = now_s - self._used_s.get(name, now_s)
            if name not in production and not self._leases[name] and idle_s >= self._settings.retire_grace_s:
                await self._remove(name)
        for name, version in production.items():
            if self._engine is not None and name not in self._loaded and len(self._loaded) < self._capacity - 1:
                with _without_the_broken(version):
                    await self._ensure(version)

    async def reconcile(self) -> None:
        """Make our list agree with the engine's: it is the truth about what it holds, we are about what it should."""
        if self._engine is None:
            return
        async with self._loading:
            held = await self._engine.adapters()
            for name in self.resident:
                if name not in held.registered:
                    logger.warning("adapter missing in engine", extra={"adapter": name})
                    self._loaded.pop(name)
            # A removal is refused while the engine still aborts a request; the weights stay, without a name: ask again.
            for name in (held.registered | held.resident) - self._loaded.keys():
                if not self._leases[name]:
                    logger.warning("adapter unknown to the gateway removed", extra={"adapter": name})
                    await self._engine.remove(name)

    async def run(self) -> None:
        """Sweep and reconcile for ever. An engine that is away is somebody else's business: the supervisor's."""
        last_s = time.monotonic()
        async with self._tasks:
            while True:
                await asyncio.sleep(self._settings.sweep_s)
                try:
                    await self.sweep()
                    if time.monotonic() - last_s >= self._settings.reconcile_s:
                        last_s = time.monotonic()
                        await self.reconcile()
                except EngineUnavailableError:
                    logger.info("engine away, adapters left alone")
                except Exception:
                    logger.exception("adapter sweep failed")

    def _load_ahead(self) -> None:
        if self._wanted and not self._loading_ahead and self._has_room():
            self._loading_ahead = True
            self._tasks.start(self._load_wanted(), name="load ahead")

    async def _load_wanted(self) -> None:
        """One at a time, so that a request whose turn has come waits for one load before its own at most."""
        try:
            while self._wanted and self._has_room():
                version = self._wanted.pop(next(iter(self._wanted)))
                with _without_the_broken(version):
                    await self._ensure(version)
        except EngineUnavailableError:
            self._wanted.clear()
        finally:
            self._loading_ahead = False

    def _has_room(self) -> bool:
        return len(self._loaded) < self._capacity or not self._claims.keys() >= self._loaded.keys()

    async def _ensure(self, version: AdapterVersion) -> None:
        name = version.engine_name
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self._loaded:
                return
            folder = await self._fetch(version)
            async with self._loading:
                await self._make_room()
                await asyncio.sleep(max(0.0, self._next_load_s - time.monotonic()))
                if self._engine is None:
                    raise NoReplicaError
                started_s = time.monotonic()
                await self._load(self._engine, version, folder)
                took_s = time.monotonic() - started_s
                self._load_times.append(took_s)
                self._next_load_s = started_s + took_s + min(self._load_times) * (1 / self._settings.stall_share - 1)
                self._metrics.load_stall.labels(self._engine.id).observe(took_s)
        logger.info("adapter loaded", extra={"adapter": name, "load_s": round(took_s, 4)})

    async def _load(self, engine: Engine, version: AdapterVersion, folder: Path) -> None:
        """Raises AdapterLoadError for a version at whose load engines have died: it would take the next one along."""
        name = version.engine_name
        if self._deaths[name] >= DEADLY:
            raise AdapterLoadError(f"Version '{name}' is set aside: engines ended {DEADLY} times while it was loaded.")
        try:
            await engine.load(name, folder)
        except EngineUnavailableError:
            self._deaths[name] += 1
            raise
        self._deaths.pop(name, None)
        self._note_loaded(version)

    async def _make_room(self) -> None:
        """Evict the least recently used version nobody holds; last what production needs, and what a request waits for."""
        if len(self._loaded) < self._capacity:
            return
        production = {version.engine_name for version in self._production()}
        idle = [name for name in self._loaded if not self._leases[name]]
        victim = min(idle, key=lambda name: (name in self._claims, name in production), default=None)
        if victim is not None and self._engine is not None:
            self._loaded.pop(victim)
            await self._engine.remove(victim)
            self._metrics.evictions.labels(self._engine.id, "room").inc()

    async def _remove(self, name: str) -> None:
        """The name's lock keeps a load of the same name out until the engine has let go of it."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name not in self._loaded or self._leases[name] or self._engine is None:
                return
            self._loaded.pop(name)
            await self._engine.remove(name)
            self._metrics.evictions.labels(self._engine.id, "unused").inc()
        logger.info("adapter freed", extra={"adapter": name})

    def _note_lookup(self, *, hit: bool) -> None:
        if self._engine is not None:
            self._metrics.lookups.labels(self._engine.id, "hit" if hit else "miss").inc()

    def _note_loaded(self, version: AdapterVersion) -> None:
        self._loaded[version.engine_name] = version
        self._touch(version.engine_name)

    def _touch(self, name: str) -> None:
        if name in self._loaded:
            self._used_s[name] = time.monotonic()
            self._loaded.move_to_end(name)

    def _forget_use(self) -> None:
        """Drop what is remembered of names that are not loaded any more."""
        for name in self._used_s.keys() - self._loaded.keys():
            del self._used_s[name]


@contextmanager
def _without_the_broken(version: AdapterVersion) -> Iterator[None]:
    """Log a version that cannot be fetched or loaded and go on with the next; an engine that is away ends the round."""
    try:
        yield
    except EngineUnavailableError:
        raise
    except (AdapterError, GatewayError, OSError) as exc:
        logger.error("adapter left out", extra={"adapter": version.engine_name, "reason": str(exc)})
