"""Opening the registry's database: migrations, both kinds, what goes wrong."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from adapters.database import HEAD, open_database, reading, writing
from adapters.errors import DatabaseError, InvalidValueError
from adapters.ledger import Ledger, UsageFilter
from adapters.models import Base, TenantRow
from adapters.registry import Registry, Scope


def test_the_newest_migration_is_the_one_the_code_expects() -> None:
    config = Config()
    config.set_main_option("script_location", "adapters:migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_migrations_make_exactly_the_tables_the_models_describe(database: sa.Engine) -> None:
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_opening_again_keeps_what_is_there(database_url: str) -> None:
    first = open_database(database_url)
    with writing(first) as session:
        session.add(TenantRow(name="acme", created_at=1.0, cache_salt="salt", weight=1.0))
    first.dispose()
    second = open_database(database_url)
    with reading(second) as session:
        assert session.scalars(sa.select(TenantRow.name)).all() == ["acme"]
    second.dispose()


def test_a_new_sqlite_file_is_opened_by_many_at_once(tmp_path: Path) -> None:
    open_many(str(tmp_path / "registry.db"))


def test_an_empty_postgres_database_is_opened_by_many_at_once(postgres_url: str) -> None:
    open_many(postgres_url)


def open_many(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for engine in pool.map(open_database, [url] * 6):
            assert sa.inspect(engine).has_table("adapter_versions")
            engine.dispose()


@pytest.mark.slow
def test_two_processes_open_a_new_sqlite_file_at_once(tmp_path: Path) -> None:
    code = f"from adapters.database import open_database; open_database({str(tmp_path / 'registry.db')!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]


def test_a_bare_path_is_a_sqlite_file_in_write_ahead_mode(tmp_path: Path) -> None:
    engine = open_database(str(tmp_path / "registry.db"))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "needs a SQLite file"),
        ("sqlite:///:memory:", "needs a SQLite file"),
        ("mysql://localhost/registry", "'mysql' are not supported"),
        ("sqlite:////nowhere/at/all/registry.db", "unable to open database file"),
        ("postgresql://localhost:1/registry?connect_timeout=1", "cannot be used"),
        ("postgresql://user:hunter2@localhost:1/registry?connect_timeout=1", "user:\\*\\*\\*@"),
        ("://", "is not a database URL"),
    ],
)
def test_a_database_that_cannot_be_used_says_why(url: str, message: str) -> None:
    with pytest.raises(DatabaseError, match=message):
        open_database(url)


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_text("not a database, " * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        open_database(str(path))


def test_a_database_from_a_newer_lorikeet_is_refused_unchanged(database_url: str) -> None:
    engine = open_database(database_url)
    with writing(engine) as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(DatabaseError, match="schema 9999, which this Lorikeet does not know"):
        open_database(database_url)


def test_a_failed_write_leaves_nothing(database: sa.Engine) -> None:
    def write_and_fail() -> None:
        with writing(database) as session:
            session.add(TenantRow(name="acme", created_at=1.0, cache_salt="salt", weight=1.0))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with reading(database) as session:
        assert session.scalars(sa.select(TenantRow)).all() == []


def test_a_writer_killed_half_way_leaves_neither_a_row_nor_a_lock(database_url: str) -> None:
    engine = open_database(database_url)
    code = f"""
import os, signal
from adapters.database import open_database, writing
from adapters.models import TenantRow
with writing(open_database({database_url!r})) as session:
    session.add(TenantRow(name="killed", created_at=1.0, cache_salt="salt", weight=1.0))
    session.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with writing(engine) as session:
        session.add(TenantRow(name="alive", created_at=1.0, cache_salt="salt", weight=1.0))
    with reading(engine) as session:
        assert session.scalars(sa.select(TenantRow.name)).all() == ["alive"]
    engine.dispose()


def test_a_read_sees_one_moment(database: sa.Engine) -> None:
    count = sa.select(sa.func.count()).select_from(TenantRow)
    with reading(database) as session:
        before = session.scalar(count)
        with writing(database) as other:
            other.add(TenantRow(name="acme", created_at=1.0, cache_salt="salt", weight=1.0))
        assert session.scalar(count) == before


def test_what_postgres_cannot_hold_is_the_callers_to_mend(postgres_url: str) -> None:
    engine = open_database(postgres_url)
    registry, ledger = Registry(engine, secret=b"test secret"), Ledger(engine)
    registry.create_tenant("acme")
    for act in (
        lambda: registry.tenant("a\0"),
        lambda: registry.create_key("acme", [Scope.INFERENCE], name="a\0"),
        lambda: ledger.entry("\0"),
        lambda: ledger.sums(0, 3600, 3600, only=UsageFilter(models=["\0"])),
    ):
        with pytest.raises(InvalidValueError, match="NUL"):
            act()
    assert registry.keys() == []
    engine.dispose()


def test_a_statement_on_postgres_does_not_wait_for_ever_unless_the_url_says_so(postgres_url: str) -> None:
    def time_out(url: str) -> str:
        engine = open_database(url)
        with engine.connect() as connection:
            found = str(connection.execute(sa.text("SHOW statement_timeout")).scalar_one())
        engine.dispose()
        return found

    assert time_out(postgres_url) == "30s"
    own = sa.make_url(postgres_url).update_query_dict({"options": "-c statement_timeout=7s"})
    assert time_out(own.render_as_string(hide_password=False)) == "7s"
