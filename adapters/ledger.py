"""The ledger of generation requests: a row for each, and their totals by the hour. Handed in twice, a row counts once.

The rows answer questions about single requests and may be deleted after a while; the totals stay and are what sums are
made of, so that they take as long with a million requests as with a thousand.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from adapters.database import reading, writing
from adapters.errors import DatabaseError
from adapters.models import UsageHourRow, UsageRow

HOUR_S = 3600
_IDS_A_QUERY = 500  # bound variables in one statement; SQLite's oldest limit is 999
_DELETED_AT_ONCE = 10_000  # rows; writers wait meanwhile


class Entry(NamedTuple):
    """One generation request. A tuple, because one is made for each request on the gateway's event loop.

    Times that end in `_s` are seconds after its arrival; None: it did not come to that. A field that is added goes last and has
    a default: an older version's spool has fewer.
    """

    request_id: str
    received_ms: int  # Unix milliseconds of its arrival
    route: str
    tenant: str
    key_id: str
    model: str  # `owner/adapter`, or the base model's name
    version: int | None  # None: the base model
    requested: str  # `model` as the caller wrote it
    replica: str | None
    stream: bool
    outcome: str  # ok, cancelled, or the error's code
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's
    output_tokens: int = 0
    estimated: bool = False  # the engine could not be asked for the counts
    input_cost: float = 0.0  # of the prompt's tokens that were not cached, in the currency of the gateway's prices
    cached_cost: float = 0.0
    output_cost: float = 0.0
    queued_s: float | None = None
    admitted_s: float | None = None
    loaded_s: float | None = None  # its adapter is in the engine
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    ended_s: float | None = None

    @property
    def cost(self) -> float:
        return self.input_cost + self.cached_cost + self.output_cost

    @property
    def hour(self) -> int:
        """Unix seconds at which its hour began."""
        return self.received_ms // 1000 // HOUR_S * HOUR_S


@dataclass(frozen=True)
class Sums:
    """What the requests of one bucket and group came to. A dimension that was not grouped by is None."""

    start: int  # Unix seconds
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    input_cost: float
    cached_cost: float
    output_cost: float
    tenant: str | None = None
    key_id: str | None = None
    model: str | None = None

    @property
    def cost(self) -> float:
        return self.input_cost + self.cached_cost + self.output_cost


@dataclass(frozen=True)
class UsageFilter:
    """Which requests to sum. None: all."""

    tenants: Collection[str] | None = None
    keys: Collection[str] | None = None
    models: Collection[str] | None = None


EVERYTHING = UsageFilter()


@dataclass(frozen=True)
class Spent:
    """What was spent since a moment, by tenant and by API key, in the currency of the gateway's prices."""

    tenants: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, float] = field(default_factory=dict)


class Ledger:
    """Synchronous and safe to use from several threads and processes, like the registry in whose database it lives."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, entries: Sequence[Entry]) -> int:
        """Write the entries that are not there yet, with their totals, in one transaction. Returns how many those were.

        Raises DatabaseError, and then none of them is written.
        """
        if not entries:
            return 0
        with writing(self._engine) as session:
            unique = {entry.request_id: entry for entry in entries}
            known = _known(session, list(unique))
            fresh = [entry for entry in unique.values() if entry.request_id not in known]
            if fresh:
                try:
                    session.connection().execute(sa.insert(UsageRow), [entry._asdict() for entry in fresh])
                except IntegrityError as exc:  # a transaction whose end we were not told came through after all
                    raise DatabaseError("Some of the same ledger rows were written meanwhile. Try again.") from exc
                _add_totals(session, fresh)
            return len(fresh)

    def entry(self, request_id: str) -> Entry | None:
        with reading(self._engine) as session:
            found = session.execute(sa.select(*_COLUMNS).where(UsageRow.request_id == request_id)).one_or_none()
        return Entry(*found) if found is not None else None

    def sums(
        self, start: int, end: int, width_s: int, *, group_by: Collection[str] = (), only: UsageFilter = EVERYTHING
    ) -> list[Sums]:
        """Sums by bucket of `width_s` seconds from Unix second `start` to before `end`, both at a bucket's edge.

        group_by: of tenant, key_id and model. Widths below an hour are summed from the rows, as far as those are kept.
        """
        row = UsageHourRow if width_s % HOUR_S == 0 else UsageRow
        moment = UsageHourRow.hour if row is UsageHourRow else UsageRow.received_ms // 1000
        bucket = (moment // width_s * width_s).label("bucket")
        groups = [name for name in _DIMENSIONS if name in group_by]
        keys = [bucket, *(getattr(row, name) for name in groups)]
        requests = sa.func.sum(UsageHourRow.requests) if row is UsageHourRow else sa.func.count()
        query = (
            sa.select(*keys, requests.label("requests"), *(_total(getattr(row, name)) for name in _AMOUNTS))
            .where(*_within(row, start, end), *_conditions(row, only))
            .group_by(*keys)
            .order_by(*keys)
        )
        with reading(self._engine) as session:
            names = ("start", *groups, "requests", *_AMOUNTS)
            return [Sums(**dict(zip(names, found, strict=True))) for found in session.execute(query)]

    def spent_since(self, start: int) -> Spent:
        """start: Unix seconds of an hour's beginning."""
        cost = _total(UsageHourRow.input_cost + UsageHourRow.cached_cost + UsageHourRow.output_cost)
        query = (
            sa.select(UsageHourRow.tenant, UsageHourRow.key_id, cost)
            .where(UsageHourRow.hour >= start)
            .group_by(UsageHourRow.tenant, UsageHourRow.key_id)
        )
        tenants: dict[str, float] = {}
        keys: dict[str, float] = {}
        with reading(self._engine) as session:
            for tenant, key_id, amount in session.execute(query):
                tenants[tenant] = tenants.get(tenant, 0.0) + amount
                keys[key_id] = keys.get(key_id, 0.0) + amount
        return Spent(tenants, keys)

    def prune(self, before_ms: int) -> int:
        """Delete rows of requests that arrived before (Unix milliseconds); their totals stay. Returns how many."""
        old = sa.select(UsageRow.request_id).where(UsageRow.received_ms < before_ms).limit(_DELETED_AT_ONCE)
        deleted = 0
        while True:
            with writing(self._engine) as session:
                result = session.connection().execute(sa.delete(UsageRow).where(UsageRow.request_id.in_(old)))
            deleted += result.rowcount
            if result.rowcount < _DELETED_AT_ONCE:
                return deleted


_COLUMNS = tuple(getattr(UsageRow, name) for name in Entry._fields)
_DIMENSIONS = ("tenant", "key_id", "model")
_AMOUNTS = ("prompt_tokens", "cached_tokens", "output_tokens", "input_cost", "cached_cost", "output_cost")


def _known(session: Session, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for place in range(0, len(ids), _IDS_A_QUERY):
        part = ids[place : place + _IDS_A_QUERY]
        found.update(session.scalars(sa.select(UsageRow.request_id).where(UsageRow.request_id.in_(part))))
    return found


def _add_totals(session: Session, entries: Iterable[Entry]) -> None:
    """Requests that reached no engine are no model requests. Sorted, so that two gateways cannot wait for each other."""
    totals: dict[tuple[int, str, str, str], list[float]] = {}
    for entry in entries:
        if entry.sent_s is not None:
            place = totals.setdefault((entry.hour, entry.tenant, entry.key_id, entry.model), [0] * (1 + len(_AMOUNTS)))
            place[0] += 1
            for index, name in enumerate(_AMOUNTS, start=1):
                place[index] += getattr(entry, name)
    if not totals:
        return
    names = ("requests", *_AMOUNTS)
    rows = [
        {"hour": key[0], "tenant": key[1], "key_id": key[2], "model": key[3]} | dict(zip(names, amounts, strict=True))
        for key, amounts in sorted(totals.items())
    ]
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert = dialect.insert(UsageHourRow)  # the dialect's own: what to do on a conflict is not in the standard
    raised = {name: getattr(UsageHourRow, name) + insert.excluded[name] for name in names}
    upsert = insert.on_conflict_do_update(index_elements=["hour", "tenant", "key_id", "model"], set_=raised)
    session.connection().execute(upsert, rows)


def _total(amount: Any) -> Any:
    """Postgres sums big integers as decimals; what we add up fits the column's own kind."""
    return sa.cast(sa.func.sum(amount), amount.type)


def _within(row: Any, start: int, end: int) -> list[Any]:
    if row is UsageHourRow:
        return [UsageHourRow.hour >= start, UsageHourRow.hour < end]
    reached = UsageRow.sent_s.is_not(None)
    return [UsageRow.received_ms >= start * 1000, UsageRow.received_ms < end * 1000, reached]


def _conditions(row: Any, only: UsageFilter) -> list[Any]:
    wanted = {row.tenant: only.tenants, row.key_id: only.keys, row.model: only.models}
    return [column.in_(values) for column, values in wanted.items() if values is not None]
