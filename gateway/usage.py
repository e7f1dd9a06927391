"""Metering: a ledger row for each generation request, kept off the hot path and safe within a flush; what a month has cost.

record -> memory -> (every flush) a spool on disk, synced -> the database -> dropped from the spool. A kill between any two
steps repeats the later ones at the next start, and the ledger writes a row it knows only once. While the database is away
the spool keeps the rows; while the disk is full memory does, up to a bound.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import orjson

from adapters.errors import DatabaseError
from adapters.ledger import Entry, Ledger, Spent
from gateway.meter import Meter
from gateway.metrics import Metrics
from gateway.settings import Price, UsageSettings
from gateway.spool import Spool, claim_spools

logger = logging.getLogger(__name__)

DAY_MS = 24 * 3600 * 1000
PRUNE_EVERY_S = 3600.0


def cost_of(entry: Entry, price: Price) -> tuple[float, float, float]:
    """Of the prompt's uncached tokens, its cached ones, and the output."""
    cached = price.input if price.cached is None else price.cached
    uncached_tokens = max(0, entry.prompt_tokens - entry.cached_tokens)
    return (
        uncached_tokens * price.input / 1e6,
        entry.cached_tokens * cached / 1e6,
        entry.output_tokens * price.output / 1e6,
    )


def month_start(now: float) -> int:
    """Unix second at which the month (UTC) of this moment began."""
    moment = datetime.fromtimestamp(now, UTC)
    return int(datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp())


class Spending:
    """What each tenant and each key spent in the current month (UTC)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._month = month_start(clock())
        self._next_month = month_start(self._month + 32 * 86400)
        self._tenants: dict[str, float] = {}
        self._keys: dict[str, float] = {}

    @property
    def month(self) -> int:
        """When it began, in Unix seconds."""
        self._turn_the_page()
        return self._month

    def add(self, entry: Entry) -> None:
        if entry.cost and entry.received_ms >= self.month * 1000:
            self._tenants[entry.tenant] = self._tenants.get(entry.tenant, 0.0) + entry.cost
            self._keys[entry.key_id] = self._keys.get(entry.key_id, 0.0) + entry.cost

    def replace(self, spent: Spent, month: int, others: Iterable[Entry]) -> None:
        """Begin again from what the database says of a month, and the entries it does not hold yet."""
        if month != self.month:
            return
        self._tenants, self._keys = dict(spent.tenants), dict(spent.keys)
        for entry in others:
            self.add(entry)

    def of_tenant(self, name: str) -> float:
        self._turn_the_page()
        return self._tenants.get(name, 0.0)

    def of_key(self, key_id: str) -> float:
        self._turn_the_page()
        return self._keys.get(key_id, 0.0)

    def _turn_the_page(self) -> None:
        now = self._clock()
        if now >= self._next_month:
            self._month = month_start(now)
            self._next_month = month_start(self._month + 32 * 86400)
            self._tenants.clear()
            self._keys.clear()


class Usage:
    """One gateway's meter. Everything but `open`, `close` and `find` is for the event loop and waits for nothing."""

    def __init__(
        self,
        ledger: Ledger,
        spools: Sequence[Spool],
        settings: UsageSettings,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """spools: this gateway's own, then those that killed ones left. clock: Unix seconds."""
        self._ledger = ledger
        self._own, *self._left = spools
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._priced = any(_costs(price) for price in (settings.prices, *settings.adapter_prices.values()))
        self._in_flight: dict[str, Meter] = {}
        self._new: list[Entry] = []  # not on disk yet
        self._unwritten: dict[str, Entry] = {}  # not known to be in the database; the oldest first
        self._spending = Spending(clock)
        self._refreshed_s = self._pruned_s = float("-inf")
        self._spool_lock = threading.Lock()
        self.troubles: set[str] = set()  # disk, database: what takes no rows now
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._storing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, ledger: Ledger, folder: Path, settings: UsageSettings, metrics: Metrics) -> "Usage":
        """Writes first what a killed gateway left in the folder. Raises OSError, DatabaseError."""
        usage = cls(ledger, await asyncio.to_thread(claim_spools, folder), settings, metrics)
        await usage._store()
        await usage._refresh()
        usage._running = asyncio.create_task(usage._run(), name="usage")
        return usage

    async def close(self) -> None:
        """Write what is left."""
        self._stopping.set()
        if self._running is not None:
            await self._running
        for spool in (self._own, *self._left):
            spool.close()

    def begin(self, meter: Meter) -> None:
        self._in_flight[meter.request_id] = meter

    def end(self, meter: Meter, outcome: str) -> Entry:
        """The request as the ledger will have it, without its cost. outcome: ok, cancelled, or the error's code."""
        del self._in_flight[meter.request_id]
        entry = meter.entry(outcome)
        self.record(entry)
        return entry

    def record(self, entry: Entry) -> None:
        """Keep a request that has ended."""
        if self._priced:
            costs = cost_of(entry, self._settings.adapter_prices.get(entry.model, self._settings.prices))
            entry = entry._replace(input_cost=costs[0], cached_cost=costs[1], output_cost=costs[2])
            self._spending.add(entry)
        self._new.append(entry)
        self._unwritten[entry.request_id] = entry

    def spent_this_month(self, tenant: str) -> float:
        """In the currency of the prices; UTC months. Other gateways' share is as old as `usage.refresh_s`."""
        return self._spending.of_tenant(tenant)

    def key_spent_this_month(self, key_id: str) -> float:
        return self._spending.of_key(key_id)

    async def count(self, request_id: str) -> None:
        """Ask the engine what it produced for a request that is about to be cut."""
        if request_id in self._in_flight:
            await self._in_flight[request_id].count()

    async def find(self, request_id: str) -> Entry | None:
        """A request in flight here, or one that ended, here or on another gateway. Raises DatabaseError."""
        if request_id in self._in_flight:
            return self._in_flight[request_id].entry()
        return self._unwritten.get(request_id) or await asyncio.to_thread(self._ledger.entry, request_id)

    async def flush(self) -> None:
        """Rows to the disk, and, unless that is under way already, from there to the database."""
        batch, self._new = self._new, []
        if batch and not await asyncio.to_thread(self._append, batch):
            self._new[:0] = batch
        self._bound_memory()
        self._metrics.usage_waiting.set(len(self._unwritten))
        if self._storing is None or self._storing.done():
            self._storing = asyncio.create_task(self._store_or_complain(), name="usage to database")

    async def _run(self) -> None:
        stopping = False
        while not stopping:
            with contextlib.suppress(TimeoutError):
                stopping = await asyncio.wait_for(self._stopping.wait(), self._settings.flush_s)
            await self.flush()
        if self._storing is not None:
            await self._storing
        if "database" not in self.troubles:
            await self._store_or_complain()  # the last flush may have met one that was under way
        if self._new:
            logger.error("ledger rows lost at the end", extra={"rows": len(self._new)})

    def _append(self, batch: Sequence[Entry]) -> bool:
        try:
            lines = [orjson.dumps(tuple(entry)) for entry in batch]
            with self._spool_lock:
                self._own.append(lines)
        except OSError as exc:
            self._note_trouble("disk", exc)
            return False
        self._note_well("disk")
        return True

    async def _store_or_complain(self) -> None:
        try:
            await self._store()
            await self._refresh()
            await self._prune()
        except Exception as exc:  # noqa: BLE001 - the rows are on disk, and the next flush tries again
            self._note_trouble("database", exc)
        else:
            self._note_well("database")
        self._metrics.usage_waiting.set(len(self._unwritten))

    async def _store(self) -> None:
        """Everything that is on disk, or cannot get there, into the database. Raises DatabaseError."""
        for spool in (*self._left, self._own):
            while not spool.empty:
                self._forget(await asyncio.to_thread(self._store_some, spool))
        for spool in self._left:
            spool.close()
        self._left = []
        if "disk" in self.troubles and (stuck := list(self._new)):
            await asyncio.to_thread(self._ledger.add, stuck)
            self._forget([entry.request_id for entry in stuck])
            stored = {entry.request_id for entry in stuck}
            self._new = [entry for entry in self._new if entry.request_id not in stored]

    def _store_some(self, spool: Spool) -> list[str]:
        """The ids that left the spool."""
        with self._spool_lock:
            lines, size_bytes = spool.head()
        entries = [entry for line in lines if (entry := self._read(line)) is not None]
        self._ledger.add(entries)
        with self._spool_lock:
            spool.drop(size_bytes)
        return [entry.request_id for entry in entries]

    def _read(self, line: bytes) -> Entry | None:
        try:
            return Entry(*orjson.loads(line))
        except (orjson.JSONDecodeError, TypeError):
            self._metrics.usage_lost.inc()
            logger.error("a line of the spool is damaged and left out", extra={"bytes": len(line)})
            return None

    async def _refresh(self) -> None:
        """Now and then: what all gateways spent."""
        now_s = time.monotonic()
        if now_s - self._refreshed_s >= self._settings.refresh_s:
            month = self._spending.month
            spent = await asyncio.to_thread(self._ledger.spent_since, month)
            self._spending.replace(spent, month, self._unwritten.values())
            self._refreshed_s = now_s

    async def _prune(self) -> None:
        """Now and then: rows that are older than is kept."""
        now_s = time.monotonic()
        if self._settings.keep_days is not None and now_s - self._pruned_s >= PRUNE_EVERY_S:
            before_ms = int(self._clock() * 1000 - self._settings.keep_days * DAY_MS)
            await asyncio.to_thread(self._ledger.prune, before_ms)
            self._pruned_s = now_s

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._unwritten.pop(request_id, None)

    def _bound_memory(self) -> None:
        """Rows that are on disk need not be in memory; of those that are not, the oldest are lost."""
        lost = len(self._new) - self._settings.memory_rows
        if lost > 0:
            del self._new[:lost]
            self._metrics.usage_lost.inc(lost)
            logger.error("ledger rows lost: neither disk nor database takes them", extra={"rows": lost})
        while len(self._unwritten) > self._settings.memory_rows:
            del self._unwritten[next(iter(self._unwritten))]

    def _note_trouble(self, where: str, exc: Exception) -> None:
        self._metrics.usage_failures.labels(where).inc()
        if where not in self.troubles:
            self.troubles.add(where)
            known = isinstance(exc, DatabaseError | OSError)
            logger.error("ledger rows wait", extra={"where": where, "cause": str(exc)}, exc_info=None if known else exc)

    def _note_well(self, where: str) -> None:
        if where in self.troubles:
            self.troubles.discard(where)
            logger.info("ledger rows are written again", extra={"where": where})


def _costs(price: Price) -> bool:
    return bool(price.input or price.cached or price.output)
