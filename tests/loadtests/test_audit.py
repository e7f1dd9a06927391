import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.audit import SLACK_S, Audit, TenantAudit, audit_limits
from loadtests.record import Outcome, Record
from loadtests.scenario import Limit
from loadtests.slo import Verdict
from tests.loadtests.factories import make_record

LIMIT = Limit(requests_per_minute=120, burst=5)
Told = Callable[[float], float | None]


def ask(number: int, sent_s: float, *, admitted: bool, told_s: float | None = None, tenant: str = "acme") -> Record:
    return make_record(
        number,
        phase="audit",
        tenant=tenant,
        intended_s=sent_s,
        sent_s=sent_s,
        headers_s=sent_s + 0.01,
        end_s=sent_s + 0.01,
        status=200 if admitted else 429,
        outcome=Outcome.OK if admitted else Outcome.REFUSED,
        retry_after_s=told_s,
        error="" if admitted else "http 429: rate_limit_exceeded: Too many requests.",
    )


def limited(
    sent_s: Sequence[float],
    *,
    requests_per_minute: float = LIMIT.requests_per_minute,
    burst: float = LIMIT.burst,
    delays_s: Sequence[float] = (0.0,),
    told: Told = math.ceil,
) -> list[Record]:
    """What a token bucket makes of requests that reach it so much after they were sent. told: of the wait in seconds."""
    per_s, tokens, last_s = requests_per_minute / 60, float(burst), 0.0
    arrivals = sorted((at_s + delays_s[i % len(delays_s)], i, at_s) for i, at_s in enumerate(sent_s))
    records = []
    for arrived_s, number, at_s in arrivals:
        tokens = min(burst, tokens + per_s * (arrived_s - last_s))
        last_s = arrived_s
        admitted = tokens >= 1
        records.append(ask(number, at_s, admitted=admitted, told_s=None if admitted else told((1 - tokens) / per_s)))
        tokens -= admitted
    return records


def audited(records: Sequence[Record], limit: Limit = LIMIT) -> TenantAudit:
    audit = audit_limits(records, ["audit"], {"acme": limit})
    assert audit is not None
    return audit.tenants[0]


FLOOD = [i * 0.02 for i in range(1000)]  # 50 a second, where 2 are allowed


@given(
    sent_s=st.lists(st.floats(0, 60), min_size=1, max_size=120),
    delays_s=st.lists(st.floats(0, SLACK_S), min_size=1, max_size=9),
    requests_per_minute=st.sampled_from([1, 30, 60, 600, 6000]),
    burst=st.integers(1, 20),
    told=st.sampled_from([math.ceil, float]),
)
def test_a_limiter_that_keeps_to_the_limit_is_never_blamed_whenever_it_decides(
    sent_s: list[float], delays_s: list[float], requests_per_minute: int, burst: int, told: Told
) -> None:
    limit = Limit(requests_per_minute=requests_per_minute, burst=burst)
    records = limited(
        sorted(sent_s), requests_per_minute=requests_per_minute, burst=burst, delays_s=delays_s, told=told
    )
    row = audited(records, limit)
    assert row.faults == ()
    assert row.offered == len(sent_s) == row.admitted + row.refused
    assert row.told == row.refused


def test_a_flood_is_counted_as_the_oracle_counts_it() -> None:
    row = audited(limited(FLOOD))
    assert (row.offered, row.allowed, row.admitted) == (1000, 44, 44)  # 5 at once, and 2 a second over 19.98 s
    assert row.refusal is not None
    assert row.refusal.percentiles[95.0].value == pytest.approx(0.01)


def test_what_is_let_through_above_the_limit_is_a_leak() -> None:
    row = audited(limited(FLOOD, requests_per_minute=150))
    assert row.leaked == pytest.approx(10, abs=2)  # half a request a second more
    assert row.falsely_refused == 0
    assert "let through above 120 a minute, burst 5" in row.faults[0]
    assert len(row.faults) == 1  # its waits are honest for one that lets through so many


def test_a_larger_burst_than_agreed_is_a_leak() -> None:
    assert audited(limited(FLOOD, burst=9)).leaked == 4


def test_what_is_refused_within_the_limit_is_a_false_refusal() -> None:
    row = audited(limited(FLOOD, requests_per_minute=60))
    assert row.falsely_refused > 500
    assert row.leaked == 0
    assert "although it was within its limit" in row.faults[0]


@pytest.mark.parametrize(
    ("told", "short", "long"),
    [
        (math.ceil, False, False),
        (lambda wait_s: wait_s, False, False),
        (lambda _: 0.0, True, False),
        (lambda _: 60.0, False, True),
        (lambda _: None, False, False),
    ],
)
def test_a_told_wait_is_honest_when_a_token_is_there_by_then_and_not_much_before(
    told: Told, short: bool, long: bool
) -> None:
    limit = Limit(requests_per_minute=30, burst=2)
    row = audited(limited(FLOOD, requests_per_minute=30, burst=2, told=told), limit)
    assert (row.too_short > 0, row.too_long > 0) == (short, long)
    assert [fault.split(" ")[1:3] for fault in row.faults] == [
        ["too", word] for word in ("short",) * short + ("long",) * long
    ]


def test_requests_of_earlier_phases_took_their_tokens_too() -> None:
    warm_up = [make_record(i, phase="warm-up", tenant="acme", intended_s=0.0, sent_s=0.0) for i in range(5)]
    asked = [ask(9, 0.1, admitted=True)]
    assert audited(asked).leaked == 0
    assert audited(warm_up + asked).leaked == 1


def test_a_tenant_without_a_limit_must_not_be_refused_while_another_floods() -> None:
    flood = limited(FLOOD)
    other = [ask(2000 + i, i * 0.5, admitted=i != 7, tenant="quiet") for i in range(20)]
    audit = audit_limits([*flood, *other], ["audit"], {"acme": LIMIT})
    assert audit is not None
    assert [row.tenant for row in audit.tenants] == ["acme", "quiet"]
    assert audit.verdict is Verdict.MISSED
    assert audit.reasons == [
        "rate limit of tenant quiet: refused 1 times without having one (http 429: rate_limit_exceeded: Too many requests.)"
    ]


def verdict_of(audit: Audit | None) -> Verdict:
    assert audit is not None
    return audit.verdict


def test_an_audit_that_never_reached_a_limit_proves_nothing() -> None:
    assert verdict_of(audit_limits(limited(FLOOD), ["audit"], {"acme": LIMIT})) is Verdict.PASS
    assert verdict_of(audit_limits(limited([1.0, 2.0]), ["audit"], {"acme": LIMIT})) is Verdict.UNDECIDED


def test_without_audited_phases_there_is_no_audit() -> None:
    assert audit_limits(limited(FLOOD), [], {"acme": LIMIT}) is None


def test_a_request_nobody_answered_is_neither_a_leak_nor_a_reason_to_call_a_refusal_false() -> None:
    unanswered = [
        make_record(i, phase="audit", tenant="acme", sent_s=1.0, status=None, outcome=Outcome.CENSORED)
        for i in range(9)
    ]
    row = audited([*unanswered, ask(99, 1.1, admitted=False)])
    assert (row.leaked, row.falsely_refused) == (0, 0)


def test_a_wait_told_before_an_earlier_request_was_decided_is_honest() -> None:
    limit = Limit(requests_per_minute=30, burst=1)
    # the second is on its way while the third is told that the next token, then not yet taken, comes in 0.03 s
    records = limited(
        [0.0, 1.95, 1.97], requests_per_minute=30, burst=1, delays_s=[0.0, 0.25, 0.0], told=lambda wait_s: wait_s
    )
    assert [record.retry_after_s for record in records] == [None, pytest.approx(0.03), None]
    assert audited(records, limit).faults == ()


@pytest.mark.parametrize("burst", [1, 2, 20])
@pytest.mark.parametrize("requests_per_minute", [1, 600])
def test_a_server_that_refuses_everything_is_found_out(burst: int, requests_per_minute: int) -> None:
    limit = Limit(requests_per_minute=requests_per_minute, burst=burst)
    row = audited([ask(i, i * 0.5, admitted=False) for i in range(20)], limit)
    assert row.falsely_refused == 20


def test_a_refusal_for_another_reason_is_not_the_buckets() -> None:
    crowded = [
        replace(ask(i, i * 3.0, admitted=False), error="http 429: too_many_in_flight: Wait for an answer.")
        for i in range(9)
    ]
    row = audited(crowded)
    assert (row.refused, row.falsely_refused, row.faults) == (0, 0, ())
    assert audited(crowded, LIMIT.model_copy(update={"code": "too_many_in_flight"})).falsely_refused == 9
    assert audited([replace(r, error="http 429: slow down") for r in crowded]).falsely_refused == 9


def test_a_server_that_is_slow_to_refuse_is_not_blamed_for_it() -> None:
    # where one decision took 1.9 s the one before may have too, and its token is not yet back
    limit = Limit(requests_per_minute=30, burst=1)
    late = [ask(1, 0.0, admitted=True), replace(ask(2, 2.1, admitted=False), headers_s=4.0, end_s=4.0)]
    row = audited(late, limit)
    assert row.falsely_refused == 0
    assert row.slack_s == pytest.approx(1.9)
    assert audited([late[0], ask(2, 2.5, admitted=False)], limit).falsely_refused == 1
