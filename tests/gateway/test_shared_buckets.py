"""The buckets in Redis, against a real one."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.buckets import Ask, Buckets, Kind
from gateway.errors import SharedLimitsError
from gateway.shared_buckets import LEASE_S, SharedBuckets
from tests.gateway.redis_server import RedisServer

REQUESTS = Ask("tenant:acme::requests", Kind.REQUESTS, 5, 1)
OPEN = Ask("tenant:acme::open", Kind.OPEN, 2, 1)


@pytest.fixture
async def shared(redis_server: RedisServer) -> AsyncIterator[SharedBuckets]:
    made = SharedBuckets(redis_server.url, timeout_s=5.0)
    yield made
    await made.close()


def tokens(amount: int) -> Ask:
    return Ask("key:acme:k:tokens", Kind.TOKENS, 40, amount)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.one_of(st.just(0.0), st.floats(0.001, 20)), st.integers(1, 40), st.booleans(), st.integers(0, 100)
        ),
        max_size=20,
    )
)
async def test_both_kinds_of_buckets_answer_alike(
    redis_server: RedisServer, steps: list[tuple[float, int, bool, int]]
) -> None:
    redis_server.clear()
    shared = SharedBuckets(redis_server.url, timeout_s=5.0)
    local, now_s = Buckets(), 1_700_000_000.0
    held: list[tuple[list[Ask], str]] = []
    for number, (gap_s, amount, settles, used) in enumerate(steps):
        now_s += gap_s
        asks = [REQUESTS, tokens(amount), OPEN]
        answer = await shared.reserve(asks, f"r{number}", now_s=now_s)
        assert answer == local.reserve(asks, now_s)
        if answer.granted:
            held.append((asks, f"r{number}"))
        if settles and held:
            ended, lease = held.pop(0)
            refunds = [0.0, ended[1].amount - used, 0.0]
            local.settle(ended, refunds, now_s)
            await shared.settle(ended, refunds, lease, now_s=now_s)
        await shared.renew({lease: [asks[2]] for asks, lease in held}, now_s=now_s)
    await shared.close()


async def test_gateways_together_admit_no_more_than_the_limit(redis_server: RedisServer) -> None:
    gateways = [SharedBuckets(redis_server.url, timeout_s=5.0) for _ in range(3)]
    answers = await asyncio.gather(
        *(gateways[number % 3].reserve([REQUESTS], f"r{number}", now_s=1000.0) for number in range(30))
    )
    assert sum(answer.granted for answer in answers) == REQUESTS.limit
    for gateway in gateways:
        await gateway.close()


async def test_open_requests_of_a_killed_gateway_end_by_themselves(shared: SharedBuckets) -> None:
    assert (await shared.reserve([OPEN], "a", now_s=1000.0)).granted
    assert (await shared.reserve([OPEN], "b", now_s=1000.0)).granted
    await shared.renew({"b": [OPEN]}, now_s=1000.0 + LEASE_S / 2)
    assert not (await shared.reserve([OPEN], "c", now_s=1000.0 + LEASE_S - 1)).granted
    assert (await shared.reserve([OPEN], "c", now_s=1000.0 + LEASE_S + 1)).granted
    assert not (await shared.reserve([OPEN], "d", now_s=1000.0 + LEASE_S + 1)).granted


async def test_a_lease_that_has_ended_is_not_renewed(shared: SharedBuckets) -> None:
    await shared.reserve([OPEN], "a", now_s=1000.0)
    await shared.settle([OPEN], [0.0], "a", now_s=1000.0)
    await shared.renew({"a": [OPEN]}, now_s=1000.0)
    assert (await shared.reserve([OPEN], "b", now_s=1000.0)).levels == (1.0,)


async def test_many_open_requests_are_renewed_in_few_calls_and_with_patience(
    redis_server: RedisServer, shared: SharedBuckets
) -> None:
    wide = Ask(OPEN.key, OPEN.kind, 10_000, 1)
    leases = [f"r{number}" for number in range(1100)]
    for place in range(0, len(leases), 50):
        await asyncio.gather(*(shared.reserve([wide], lease, now_s=1000.0) for lease in leases[place : place + 50]))
    hasty = SharedBuckets(redis_server.url, timeout_s=0.02)
    before = redis_server.calls("evalsha")
    redis_server.freeze()
    renewing = asyncio.create_task(hasty.renew(dict.fromkeys(leases, (wide,)), now_s=1000.0 + LEASE_S / 2))
    await asyncio.sleep(0.2)
    redis_server.thaw()
    await renewing
    assert redis_server.calls("evalsha") - before <= 5
    assert (await shared.reserve([wide], "next", now_s=1000.0 + LEASE_S + 1)).levels == (1101.0,)
    await hasty.close()


async def test_redis_own_clock_refills_the_buckets(shared: SharedBuckets) -> None:
    fast = Ask("tenant:acme::requests", Kind.REQUESTS, 6000, 6000)
    assert (await shared.reserve([fast], "a")).granted
    await asyncio.sleep(0.05)
    assert (await shared.reserve([Ask(fast.key, fast.kind, 6000, 1)], "b")).granted


async def test_a_redis_that_does_not_answer_is_given_up_in_time(redis_server: RedisServer) -> None:
    shared = SharedBuckets(redis_server.url, timeout_s=0.05)
    await shared.ping()
    redis_server.freeze()
    with pytest.raises(SharedLimitsError, match="did not answer"):
        await shared.reserve([REQUESTS], "a")
    redis_server.thaw()
    for _ in range(100):
        try:
            await shared.ping()
            break
        except SharedLimitsError:
            await asyncio.sleep(0.05)
    assert (await shared.reserve([OPEN], "b")).granted
    await shared.close()


async def test_an_address_where_nothing_is_says_so(tmp_path: object) -> None:
    shared = SharedBuckets(f"unix://{tmp_path}/none.sock", timeout_s=1.0)
    with pytest.raises(SharedLimitsError, match="did not answer"):
        await shared.ping()
    await shared.close()
    with pytest.raises(SharedLimitsError, match="redis_url"):
        SharedBuckets("http://localhost", timeout_s=1.0)
