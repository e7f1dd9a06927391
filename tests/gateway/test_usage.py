"""Metering: each row once whatever is killed or away, costs, and what is spent this month."""

import asyncio
import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.database import open_database
from adapters.errors import DatabaseError
from adapters.ledger import Entry, Ledger, Spent
from gateway.metrics import Metrics
from gateway.settings import Price, UsageSettings
from gateway.spool import Spool, claim_spools
from gateway.usage import Spending, Usage, cost_of, month_start
from tests.databases import migrated_file

NOVEMBER = 1_793_491_200  # 2026-11-01 00:00 UTC
DAY_S = 86_400


def an_entry(number: int, **fields: object) -> Entry:
    plain = Entry(
        request_id=f"req_{number}",
        received_ms=int(time.time() * 1000),
        route="completions",
        tenant="acme",
        key_id="key_1",
        model="acme/support",
        version=1,
        requested="support",
        replica="engine-0",
        stream=False,
        outcome="ok",
        prompt_tokens=1000,
        cached_tokens=400,
        output_tokens=100,
        sent_s=0.01,
        ended_s=0.2,
    )
    return plain._replace(**fields)  # type: ignore[arg-type]


class BreakableLedger(Ledger):
    """Fails where a test tells it to."""

    away = False
    dies_after_commit = False

    def add(self, entries: Sequence[Entry]) -> int:
        if self.away:
            raise DatabaseError("away")
        added = super().add(entries)
        if self.dies_after_commit:
            self.away = True
            raise DatabaseError("the connection went after the commit")
        return added


class BreakableSpool(Spool):
    full = False

    def append(self, lines: Sequence[bytes]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        super().append(lines)


@pytest.fixture
def database(tmp_path: Path) -> sa.Engine:
    return open_database(str(shutil.copy(migrated_file(), tmp_path / "lorikeet.db")))


@pytest.fixture
def ledger(database: sa.Engine) -> BreakableLedger:
    return BreakableLedger(database)


SETTINGS = UsageSettings(flush_s=0.01, prices=Price(input=1000.0, cached=100.0, output=2000.0))


async def opened(ledger: Ledger, folder: Path, settings: UsageSettings = SETTINGS) -> Usage:
    return await Usage.open(ledger, folder, settings, Metrics.create())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that in ten seconds")


def counted(ledger: Ledger) -> int:
    return sum(sums.requests for sums in ledger.sums(0, int(time.time()) + 2 * DAY_S, DAY_S))


async def test_a_recorded_row_is_in_the_database_soon_with_its_cost(ledger: Ledger, tmp_path: Path) -> None:
    usage = await opened(ledger, tmp_path / "usage")
    usage.record(an_entry(1))
    await until(lambda: ledger.entry("req_1") is not None)
    await usage.close()
    entry = ledger.entry("req_1")
    assert entry is not None
    assert (entry.input_cost, entry.cached_cost, entry.output_cost) == (0.6, 0.04, 0.2)


async def test_what_was_recorded_last_is_written_at_the_end(ledger: Ledger, tmp_path: Path) -> None:
    usage = await opened(ledger, tmp_path / "usage", UsageSettings(flush_s=600))
    usage.record(an_entry(1))
    await usage.close()
    assert ledger.entry("req_1") is not None


async def test_rows_outlive_a_database_that_is_away_and_the_gateway_itself(
    ledger: BreakableLedger, tmp_path: Path
) -> None:
    usage = await opened(ledger, tmp_path / "usage")
    ledger.away = True
    for number in range(50):
        usage.record(an_entry(number))
    await usage.close()
    assert counted(ledger) == 0
    ledger.away = False
    again = await opened(ledger, tmp_path / "usage")
    assert counted(ledger) == 50
    await again.close()


async def test_a_database_that_comes_back_gets_what_it_missed(ledger: BreakableLedger, tmp_path: Path) -> None:
    usage = await opened(ledger, tmp_path / "usage")
    ledger.away = True
    usage.record(an_entry(1))
    await until(lambda: usage.troubles == {"database"})
    assert (await usage.find("req_1")) is not None
    ledger.away = False
    await until(lambda: not usage.troubles)
    assert ledger.entry("req_1") is not None
    await usage.close()


async def test_a_row_committed_just_before_a_death_is_not_counted_again(
    ledger: BreakableLedger, tmp_path: Path
) -> None:
    usage = await opened(ledger, tmp_path / "usage")
    ledger.dies_after_commit = True
    usage.record(an_entry(1))
    await until(lambda: usage.troubles == {"database"})
    await usage.close()
    assert (tmp_path / "usage" / "spool-0.jsonl").stat().st_size > 0
    ledger.away = ledger.dies_after_commit = False
    again = await opened(ledger, tmp_path / "usage")
    assert counted(ledger) == 1
    await again.close()


async def test_a_full_disk_loses_nothing_while_the_database_takes_the_rows(
    ledger: BreakableLedger, tmp_path: Path
) -> None:
    usage, spool = full_disk(ledger, tmp_path, SETTINGS)
    usage.record(an_entry(1))
    await usage.flush()
    await until(lambda: ledger.entry("req_1") is not None)
    assert usage.troubles == {"disk"}
    spool.full = False
    usage.record(an_entry(2))
    while ledger.entry("req_2") is None:
        await usage.flush()
        await asyncio.sleep(0.01)
    assert not usage.troubles
    await usage.close()
    assert counted(ledger) == 2


async def test_memory_is_bounded_while_neither_disk_nor_database_takes_rows(
    ledger: BreakableLedger, tmp_path: Path
) -> None:
    usage, spool = full_disk(ledger, tmp_path, UsageSettings(memory_rows=10))
    ledger.away = True
    for number in range(25):
        usage.record(an_entry(number))
        await usage.flush()
    ledger.away = spool.full = False
    while counted(ledger) < 10:
        await usage.flush()
        await asyncio.sleep(0.01)
    assert ledger.entry("req_24") is not None
    await usage.close()


def full_disk(ledger: Ledger, folder: Path, settings: UsageSettings) -> tuple[Usage, BreakableSpool]:
    spool = BreakableSpool(os.open(folder / "spool", os.O_RDWR | os.O_CREAT))
    spool.full = True
    return Usage(ledger, [spool], settings, Metrics.create()), spool


async def test_a_damaged_line_costs_only_itself(ledger: Ledger, tmp_path: Path) -> None:
    usage = await opened(ledger, tmp_path / "usage", UsageSettings(flush_s=600))
    await usage.close()
    (spool,) = claim_spools(tmp_path / "usage")
    spool.append([b'["req_1",', b"\0\0\0", b"[]"])
    spool.close()
    usage = await opened(ledger, tmp_path / "usage")
    usage.record(an_entry(2))
    await usage.close()
    assert counted(ledger) == 1


async def test_two_gateways_on_one_folder_and_database_write_every_row_once(ledger: Ledger, tmp_path: Path) -> None:
    first, second = [await opened(ledger, tmp_path / "usage") for _ in range(2)]
    for number in range(0, 200, 2):
        first.record(an_entry(number))
        second.record(an_entry(number + 1))
        await asyncio.sleep(0)
    await first.close()
    await second.close()
    assert counted(ledger) == 200


CHILD = """
import asyncio, itertools, os, sys
from pathlib import Path
from adapters.database import open_database
from adapters.ledger import Ledger
from gateway.metrics import Metrics
from gateway.usage import Usage
from tests.gateway.test_usage import SETTINGS, an_entry

async def main(database, folder, first):
    usage = await Usage.open(Ledger(open_database(database)), Path(folder), SETTINGS, Metrics.create())
    for number in itertools.count(int(first)):
        usage.record(an_entry(number))
        if number % 7 == 0:
            await usage.flush()
            print(number, flush=True)  # this one and all before it are on disk

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_gateways_killed_at_any_moment_leave_every_flushed_row_exactly_once(ledger: Ledger, tmp_path: Path) -> None:
    chance = random.Random(7)
    flushed: set[int] = set()
    for round_ in range(6):
        first = round_ * 1_000_000
        command = [sys.executable, "-c", CHILD, str(tmp_path / "lorikeet.db"), str(tmp_path / "usage"), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in itertools.islice(child.stdout, chance.randrange(1, 60)):
                flushed.update(range(first, int(line) + 1))
            time.sleep(chance.random() * 0.02)
            child.kill()

    async def take_over() -> None:
        await (await opened(ledger, tmp_path / "usage")).close()

    asyncio.run(take_over())
    with open_database(str(tmp_path / "lorikeet.db")).connect() as connection:
        stored = set(connection.execute(sa.text("SELECT request_id FROM usage")).scalars())
    assert {f"req_{number}" for number in flushed} <= stored
    assert counted(ledger) == len(stored)


def test_cached_tokens_have_a_price_of_their_own_or_the_prompts() -> None:
    entry = an_entry(1)
    assert cost_of(entry, Price(input=1.0, output=2.0)) == pytest.approx((600e-6, 400e-6, 200e-6))
    assert cost_of(entry, Price(input=1.0, cached=0.0, output=2.0)) == pytest.approx((600e-6, 0.0, 200e-6))


async def test_an_adapter_may_have_prices_of_its_own(ledger: Ledger, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"adapter_prices": {"acme/support": Price(output=50.0)}})
    usage = await opened(ledger, tmp_path / "usage", settings)
    usage.record(an_entry(1))
    usage.record(an_entry(2, model="acme/other"))
    assert usage.spent_this_month("acme") == pytest.approx(0.005 + 0.84)
    await usage.close()


async def test_spending_is_known_at_once_and_after_a_restart_and_to_the_other_gateway(
    ledger: Ledger, tmp_path: Path
) -> None:
    often = SETTINGS.model_copy(update={"refresh_s": 0.02})
    first, second = [await opened(ledger, tmp_path / "usage", often) for _ in range(2)]
    first.record(an_entry(1))
    assert first.spent_this_month("acme") == pytest.approx(0.84)
    assert first.key_spent_this_month("key_1") == pytest.approx(0.84)
    assert first.spent_this_month("beta") == 0.0
    await until(lambda: second.spent_this_month("acme") == pytest.approx(0.84))
    await first.close()
    await second.close()
    restarted = await opened(ledger, tmp_path / "usage", often)
    assert restarted.key_spent_this_month("key_1") == pytest.approx(0.84)
    await asyncio.sleep(0.1)
    assert restarted.spent_this_month("acme") == pytest.approx(0.84)
    await restarted.close()


def test_a_new_month_begins_at_nothing() -> None:
    now = NOVEMBER + 30 * DAY_S - 1.0
    spending = Spending(lambda: now)
    spending.add(an_entry(1, received_ms=int(now * 1000), output_cost=2.0))
    assert spending.of_tenant("acme") == 2.0
    now += 1
    assert spending.of_tenant("acme") == spending.of_key("key_1") == 0.0
    spending.add(an_entry(2, received_ms=int(now * 1000) - 1, output_cost=2.0))
    assert spending.of_tenant("acme") == 0.0  # it arrived last month
    spending.replace(Spent({"acme": 9.0}, {}), NOVEMBER, [])
    assert spending.of_tenant("acme") == 0.0  # the sum of last month
    spending.replace(
        Spent({"acme": 9.0}, {}), spending.month, [an_entry(3, received_ms=int(now * 1000), input_cost=1.0)]
    )
    assert spending.of_tenant("acme") == 10.0


@pytest.mark.parametrize("at", [0, 1, 5 * DAY_S, 30 * DAY_S - 1])
def test_months_begin_at_midnight_utc(at: int) -> None:
    assert month_start(NOVEMBER + at) == NOVEMBER


async def test_old_rows_are_deleted_and_their_totals_kept(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add([an_entry(1, received_ms=int((time.time() - 2 * DAY_S) * 1000)), an_entry(2)])
    usage = await opened(ledger, tmp_path / "usage", UsageSettings(keep_days=1))
    await usage.close()
    assert ledger.entry("req_1") is None
    assert counted(ledger) == 2
