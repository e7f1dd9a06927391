"""The ledger: every row once, sums that agree with the rows, totals that outlive them. On SQLite and on Postgres."""

import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.database import open_database
from adapters.errors import DatabaseError
from adapters.ledger import Entry, Ledger, Sums, UsageFilter
from tests.databases import migrated_file

DAY_S = 86_400
MONDAY = 1_699_833_600  # 2023-11-13 00:00 UTC


def an_entry(number: int, **fields: Any) -> Entry:
    plain = Entry(
        request_id=f"req_{number}",
        received_ms=MONDAY * 1000 + number,
        route="completions",
        tenant="acme",
        key_id="key_1",
        model="acme/support",
        version=1,
        requested="support",
        replica="engine-0",
        stream=False,
        outcome="ok",
        prompt_tokens=10,
        cached_tokens=4,
        output_tokens=5,
        input_cost=0.5,
        cached_cost=0.125,
        output_cost=1.0,
        sent_s=0.01,
        ended_s=0.2,
    )
    return plain._replace(**fields)


@pytest.fixture
def ledger(database: sa.Engine) -> Ledger:
    return Ledger(database)


def totals(ledger: Ledger, **options: Any) -> list[Sums]:
    return ledger.sums(MONDAY, MONDAY + 31 * DAY_S, DAY_S, **options)


def test_an_entry_comes_back_as_it_was_written(ledger: Ledger) -> None:
    entry = an_entry(1, queued_s=0.001, admitted_s=None, estimated=True)
    assert ledger.add([entry]) == 1
    assert ledger.entry("req_1") == entry
    assert ledger.entry("req_2") is None


def test_a_row_handed_in_again_counts_once(ledger: Ledger) -> None:
    assert ledger.add([an_entry(1), an_entry(2)]) == 2
    assert ledger.add([an_entry(2), an_entry(3), an_entry(3)]) == 1
    assert ledger.add([an_entry(1)]) == 0
    (sums,) = totals(ledger)
    assert (sums.requests, sums.prompt_tokens, sums.output_cost) == (3, 30, 3.0)


def test_gateways_that_write_the_same_rows_at_once_count_them_once(ledger: Ledger) -> None:
    entries = [an_entry(number) for number in range(200)]

    def write(first: int) -> None:
        for _ in range(50):
            try:
                for place in range(first, 200, 20):
                    ledger.add(entries[place : place + 40])
            except DatabaseError:  # as the gateway does: again
                continue
            else:
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [0, 0, 10, 0]))
    assert totals(ledger)[0].requests == 200


def test_a_request_that_reached_no_engine_is_in_no_total(ledger: Ledger) -> None:
    ledger.add([an_entry(1, sent_s=None, outcome="server_is_overloaded")])
    assert totals(ledger) == []
    assert ledger.sums(MONDAY, MONDAY + 60, 60) == []
    assert ledger.entry("req_1") is not None


def test_sums_by_bucket_and_group(ledger: Ledger) -> None:
    ledger.add(
        [
            an_entry(1),
            an_entry(2, tenant="beta", key_id="key_2"),
            an_entry(3, received_ms=(MONDAY + DAY_S) * 1000, model="acme/other"),
            an_entry(4, received_ms=(MONDAY + DAY_S) * 1000 - 1),
        ]
    )
    assert [(s.start, s.tenant, s.requests) for s in totals(ledger, group_by=["tenant"])] == [
        (MONDAY, "acme", 2),
        (MONDAY, "beta", 1),
        (MONDAY + DAY_S, "acme", 1),
    ]
    assert [(s.start, s.requests) for s in ledger.sums(MONDAY, MONDAY + DAY_S, 3600)] == [
        (MONDAY, 2),
        (MONDAY + 23 * 3600, 1),
    ]
    assert [(s.start, s.requests) for s in ledger.sums(MONDAY, MONDAY + DAY_S, 60)] == [
        (MONDAY, 2),
        (MONDAY + DAY_S - 60, 1),
    ]
    only = UsageFilter(tenants=["acme"], models=["acme/other"])
    assert [s.requests for s in totals(ledger, only=only)] == [1]
    assert totals(ledger, only=UsageFilter(tenants=[])) == []
    assert totals(ledger, only=UsageFilter(keys=["key_2"]))[0].requests == 1


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3 * DAY_S), st.sampled_from("ab"))), max_size=4
    )
)
@settings(max_examples=25)
def test_minutes_hours_and_days_add_up_to_the_rows(batches: list[list[tuple[int, int, str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = open_database(shutil.copy(migrated_file(), folder))
        ledger = Ledger(engine)
        first: dict[str, Entry] = {}
        for batch in batches:
            entries = [an_entry(n, received_ms=(MONDAY + at) * 1000, tenant=tenant) for n, at, tenant in batch]
            ledger.add(entries)
            first = {entry.request_id: entry for entry in entries} | first
        expected = Counter(entry.tenant for entry in first.values())
        for width in (60, 3600, DAY_S):
            found: Counter[str] = Counter()
            for sums in ledger.sums(MONDAY, MONDAY + 4 * DAY_S, width, group_by=["tenant"]):
                found[str(sums.tenant)] += sums.requests
            assert found == expected
        engine.dispose()


def test_rows_go_and_their_totals_stay(ledger: Ledger) -> None:
    ledger.add([an_entry(number) for number in range(5)])
    assert ledger.prune(MONDAY * 1000 + 3) == 3
    assert ledger.entry("req_2") is None
    assert ledger.entry("req_3") is not None
    assert totals(ledger)[0].requests == 5


def test_what_was_spent_since_by_tenant_and_by_key(ledger: Ledger) -> None:
    ledger.add(
        [
            an_entry(1),
            an_entry(2, key_id="key_2"),
            an_entry(3, tenant="beta", key_id="key_3"),
            an_entry(4, received_ms=MONDAY * 1000 - 1),
        ]
    )
    spent = ledger.spent_since(MONDAY)
    assert spent.tenants == {"acme": 3.25, "beta": 1.625}
    assert spent.keys == {"key_1": 1.625, "key_2": 1.625, "key_3": 1.625}
