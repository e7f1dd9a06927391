"""The registry's database: SQLite, or Postgres by URL. Opens it at the newest schema and hands out transactions."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import Session

from adapters.errors import DatabaseError, InvalidValueError

HEAD = "0007"  # newest migration; a test compares it with adapters/migrations
BUSY_TIMEOUT_S = 30  # how long a writer waits for another process on the same SQLite file
_MIGRATION_LOCK = 7_205_759_403  # any constant: Postgres' advisory lock that lets one process migrate at a time
_TURN_LOCK = 7_205_759_404  # another one: for writers whose decision rests on several rows
_BUGS = (sa_exc.IntegrityError, sa_exc.ProgrammingError)  # ours: nothing an operator could mend
_UNAVAILABLE = (sa_exc.DatabaseError, sa_exc.InterfaceError, sa_exc.TimeoutError)

_JSON: dict[str, Any] = {
    "json_serializer": lambda value: orjson.dumps(value).decode(),
    "json_deserializer": orjson.loads,
}


def open_database(url: str) -> sa.Engine:
    """An engine for `sqlite:///path`, a bare path or `postgresql://…`, with the schema brought to the newest version.

    Safe to call from several processes at once: one migrates, the others wait. Raises DatabaseError.
    """
    target = _target(url)
    engine = _sqlite(target) if target.get_backend_name() == "sqlite" else _postgres(target)
    try:
        with _said_plainly(engine):
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: sa.Engine) -> Iterator[Session]:
    """A read transaction: everything read in it is from one moment."""
    options = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    with _said_plainly(engine), Session(engine.execution_options(**options)) as session, session.begin():
        yield session


@contextmanager
def writing(engine: sa.Engine) -> Iterator[Session]:
    """A write transaction, committed when the block ends well. On SQLite it holds the file's write lock from its start,
    so what it reads cannot change before it writes."""
    options = {"lorikeet_write": True}
    with _said_plainly(engine), Session(engine.execution_options(**options)) as session, session.begin():
        yield session


def take_turns(session: Session) -> None:
    """Until this write transaction ends no other gets past the same call. On SQLite they take turns by themselves."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(_TURN_LOCK)))


def _target(url: str) -> URL:
    try:
        target = make_url(url) if "://" in url else URL.create("sqlite", database=url)
    except sa_exc.ArgumentError as exc:
        raise DatabaseError(f"'{url}' is not a database URL. Use sqlite:///PATH or postgresql://HOST/NAME.") from exc
    match target.drivername.split("+")[0]:
        case "sqlite" if target.database and target.database != ":memory:":
            return target.set(drivername="sqlite+pysqlite")
        case "sqlite":
            raise DatabaseError("The registry needs a SQLite file, not a database in memory. Use sqlite:///PATH.")
        case "postgresql" | "postgres":
            return target.set(drivername="postgresql+psycopg")
        case other:
            raise DatabaseError(f"Databases of kind '{other}' are not supported. Use SQLite or Postgres.")


def _sqlite(target: URL) -> sa.Engine:
    patience = {} if "timeout" in target.query else {"timeout": BUSY_TIMEOUT_S}
    engine = sa.create_engine(target, connect_args=patience, pool_size=16, max_overflow=32, **_JSON)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver leaves BEGIN to us: its own comes too late, and never for DDL
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("lorikeet_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


# libpq's parameters; what the URL itself says wins. Nothing of ours works on a statement for half a minute.
_PATIENCE = {"connect_timeout": "10", "options": "-c statement_timeout=30s"}


def _postgres(target: URL) -> sa.Engine:
    try:
        patience = {name: value for name, value in _PATIENCE.items() if name not in target.query}
        return sa.create_engine(
            target, connect_args=patience, pool_pre_ping=True, pool_size=8, max_overflow=24, **_JSON
        )
    except ModuleNotFoundError as exc:
        raise DatabaseError("Postgres needs its driver. Install it with: pip install 'lorikeet[postgres]'") from exc


def _migrate(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        current = _revision(connection)
    if current == HEAD:  # the usual case, without importing Alembic
        return
    if engine.dialect.name == "sqlite":
        _write_ahead(engine)
    with engine.execution_options(lorikeet_write=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        if _revision(connection) != HEAD:
            _upgrade(connection)


def _write_ahead(engine: sa.Engine) -> None:
    """Readers and the writer of this file no longer wait for each other. The file remembers it.

    Two that switch a file at once would wait for each other, so SQLite refuses one without waiting: it tries again.
    """
    ends_s = time.monotonic() + BUSY_TIMEOUT_S
    raw = engine.raw_connection()
    try:
        while True:
            try:
                raw.cursor().execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > ends_s:
                    raise
                time.sleep(0.01)
    finally:
        raw.close()


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "adapters:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as exc:
        raise DatabaseError(
            f"The registry's database is at schema {_revision(connection)}, which this Lorikeet does not know. "
            "Use the newer Lorikeet that wrote it, or restore a backup."
        ) from exc


@contextmanager
def _said_plainly(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except _BUGS:
        raise
    except sa_exc.DataError as exc:  # Postgres' own; SQLite takes these values
        raise InvalidValueError("A value cannot be stored or looked up: has it a NUL character (\\0) in it?") from exc
    except _UNAVAILABLE as exc:
        engine.dispose()  # a connection may hold on to a file or a server that is not there any more
        reason = str(getattr(exc, "orig", None) or exc).strip().splitlines()[0]
        raise DatabaseError(
            f"The registry's database {engine.url.render_as_string(hide_password=True)} cannot be used: {reason}. "
            "Check that it is running, reachable, writable and that its disk has room."
        ) from exc
