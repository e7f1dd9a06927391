"""Which limits a request meets, how they are kept together, and what happens when Redis goes away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping

import pytest

from adapters.registry import AdapterVersion, LimitKind, Limits, LimitSubject, Snapshot, VersionStatus
from gateway.errors import BudgetSpentError, RateLimitError, RequestTooLargeError, TooManyRequestsError
from gateway.limits import Grant, Limiter
from gateway.metrics import Metrics
from gateway.settings import LimitSettings
from gateway.shared_buckets import RENEW_S, SharedBuckets
from tests.adapters.conftest import Clock
from tests.gateway.redis_server import RedisServer

TENANT = LimitSubject(LimitKind.TENANT, "acme")
KEY = LimitSubject(LimitKind.KEY, "acme", "key_1")
ADAPTER = LimitSubject(LimitKind.ADAPTER, "globex", "support")
SUPPORT = AdapterVersion("globex", "support", 1, "d" * 64, VersionStatus.READY, 0.0, 8, 16, 100, {})


def snapshot(limits: Mapping[LimitSubject, Limits]) -> Snapshot:
    return Snapshot(counter=1, tenants={}, keys={}, adapters={}, versions={}, limits=limits)


def limiter(limits: LimitSettings | None = None, **parts: object) -> Limiter:
    return Limiter(limits or LimitSettings(), Metrics.create(), **parts)  # type: ignore[arg-type]


async def ask(
    one: Limiter, limits: Mapping[LimitSubject, Limits], *, tokens: int = 10, lease: str = "r", found: bool = True
) -> Grant:
    """A request of acme's with key_1 for globex' adapter."""
    seen = SNAPSHOTS.setdefault(tuple(limits.items()), snapshot(limits))
    return await one.reserve(seen, "acme", "key_1", SUPPORT if found else None, tokens, lease=lease)


SNAPSHOTS: dict[object, Snapshot] = {}


async def test_without_limits_only_open_requests_are_counted() -> None:
    one = limiter(LimitSettings(max_in_flight=2))
    first, _ = await ask(one, {}), await ask(one, {})
    assert first.headers == {}
    with pytest.raises(TooManyRequestsError, match="tenant acme already has 2 requests open"):
        await ask(one, {})
    first.settle(10)
    await ask(one, {})
    assert one.open_requests("acme") == 2


@pytest.mark.parametrize("subject", [TENANT, KEY, ADAPTER], ids=str)
async def test_each_subjects_limits_hold(subject: LimitSubject) -> None:
    one = limiter(clock=Clock())
    limits = {subject: Limits(requests_per_minute=2)}
    for _ in range(2):
        await ask(one, limits)
    with pytest.raises(RateLimitError, match=f"for {subject} on requests") as refused:
        await ask(one, limits)
    assert refused.value.type == "requests"
    assert refused.value.retry_after_s == pytest.approx(30)
    assert refused.value.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    if subject is ADAPTER:
        await ask(one, limits, found=False)


async def test_a_request_takes_from_all_its_limits_or_from_none() -> None:
    one = limiter(clock=Clock())
    both = {TENANT: Limits(requests_per_minute=10), KEY: Limits(requests_per_minute=1, max_in_flight=5)}
    await ask(one, both)
    for _ in range(3):
        with pytest.raises(RateLimitError, match="API key key_1"):
            await ask(one, both)
    assert one.open_requests("acme") == 1
    alone = {TENANT: Limits(requests_per_minute=10)}
    assert (await ask(one, alone)).headers["x-ratelimit-remaining-requests"] == "8"


async def test_tokens_are_reserved_and_settled_with_what_was_used() -> None:
    one = limiter(clock=Clock())
    limits = {TENANT: Limits(tokens_per_minute=100)}
    grant = await ask(one, limits, tokens=90)
    assert grant.headers == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "10",
        "x-ratelimit-reset-tokens": "54s",
    }
    with pytest.raises(RateLimitError, match=r"Limit 100, Used 90, Requested 20\. Please try again in 6s") as refused:
        await ask(one, limits, tokens=20)
    assert refused.value.type == "tokens"
    grant.settle(30)
    grant.settle(0)
    assert (await ask(one, limits, tokens=20)).headers["x-ratelimit-remaining-tokens"] == "50"
    (await ask(one, limits, tokens=50)).settle(120)
    with pytest.raises(RateLimitError, match=r"Used 170, Requested 1\. Please try again in 43s"):
        await ask(one, limits, tokens=1)


async def test_a_request_larger_than_a_minutes_tokens_is_not_asked_to_wait() -> None:
    one = limiter()
    with pytest.raises(RequestTooLargeError, match="Limit 100, Requested 101"):
        await ask(one, {TENANT: Limits(tokens_per_minute=100)}, tokens=101)


async def test_requests_without_tokens_meet_no_token_limit() -> None:
    one = limiter()
    assert (await ask(one, {TENANT: Limits(tokens_per_minute=1)}, tokens=0)).headers == {}


async def test_headers_tell_of_the_limit_with_the_least_left() -> None:
    grant = await ask(limiter(), {TENANT: Limits(requests_per_minute=3), ADAPTER: Limits(requests_per_minute=2)})
    assert grant.headers["x-ratelimit-limit-requests"] == "2"


@pytest.mark.parametrize("subject", [TENANT, KEY], ids=str)
async def test_a_spent_budget_refuses(subject: LimitSubject) -> None:
    spent = {subject: 5.0}
    one = limiter(spent=lambda one: spent.get(one, 0.0))
    await ask(one, {subject: Limits(monthly_budget=5.01)})
    with pytest.raises(BudgetSpentError, match=str(subject)):
        await ask(one, {subject: Limits(monthly_budget=5.0)})


async def test_defaults_hold_for_tenants_without_limits_of_their_own() -> None:
    one = limiter(LimitSettings(requests_per_minute=1), clock=Clock())
    await ask(one, {TENANT: Limits(tokens_per_minute=100)})
    with pytest.raises(RateLimitError, match="Limit 1,"):
        await ask(one, {TENANT: Limits(tokens_per_minute=100)})
    own = {TENANT: Limits(requests_per_minute=3)}
    assert (await ask(limiter(LimitSettings(requests_per_minute=1)), own)).headers["x-ratelimit-limit-requests"] == "3"


async def test_observing_lets_through_counts_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics.create()
    one = Limiter(LimitSettings(observe_only=True), metrics, clock=Clock(), spent=lambda _: 7.0)
    for limits in ({TENANT: Limits(requests_per_minute=1)}, {KEY: Limits(monthly_budget=5)}):
        for _ in range(3):
            grant = await ask(one, limits)
            grant.settle(10)
    text = metrics.exposition().decode()
    assert 'gateway_limit_refusals_total{enforced="false",limit="requests",on="tenant"} 2.0' in text
    assert 'gateway_limit_refusals_total{enforced="false",limit="budget",on="key"} 3.0' in text
    assert [record.message for record in caplog.records] == ["request above its limit let through"]


@pytest.fixture
async def pair(redis_server: RedisServer) -> AsyncIterator[list[Limiter]]:
    """Two gateways that share their limits."""
    settings = LimitSettings(redis_url=redis_server.url, gateways=2)
    made = [limiter(settings, shared=SharedBuckets(redis_server.url, timeout_s=0.2)) for _ in range(2)]
    running = [asyncio.create_task(one.run()) for one in made]
    yield made
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for one in made:
        async with one:
            pass


async def admitted(gateways: list[Limiter], limits: Mapping[LimitSubject, Limits], *, tries: int = 12) -> int:
    count = 0
    for number in range(tries):
        try:
            await ask(gateways[number % len(gateways)], limits, lease=f"r{number}")
            count += 1
        except (RateLimitError, TooManyRequestsError):
            pass
    return count


async def test_gateways_with_redis_share_one_limit(pair: list[Limiter]) -> None:
    assert await admitted(pair, {TENANT: Limits(requests_per_minute=6)}) == 6
    assert await admitted(pair, {KEY: Limits(max_in_flight=5)}) == 5


async def test_what_a_request_used_is_settled_in_redis_too(pair: list[Limiter]) -> None:
    limits = {TENANT: Limits(tokens_per_minute=100, max_in_flight=1)}
    grant = await ask(pair[0], limits, tokens=90)
    with pytest.raises((RateLimitError, TooManyRequestsError)):
        await ask(pair[1], limits, tokens=90)
    grant.settle(5)
    for _ in range(100):
        try:
            await ask(pair[1], limits, tokens=90)
            break
        except (RateLimitError, TooManyRequestsError):
            await asyncio.sleep(0.02)
    else:
        pytest.fail("not settled")


async def test_while_redis_is_away_each_gateway_allows_its_share_and_then_they_share_again(
    pair: list[Limiter], redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {TENANT: Limits(requests_per_minute=6)}
    await ask(pair[0], limits)
    redis_server.freeze()
    assert await admitted(pair, limits) == 2 * 3
    assert len([record for record in caplog.records if "until Redis answers" in record.message]) == 2
    redis_server.thaw()
    redis_server.clear()
    for _ in range(100):
        if all(one.shares for one in pair):
            break
        await asyncio.sleep(0.1)
    assert await admitted(pair, limits) == 6


async def test_leases_that_are_not_renewed_in_time_are_tried_again_and_redis_is_not_held_to_be_away(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    settings, clock = LimitSettings(redis_url=redis_server.url, gateways=2), Clock()
    buckets = SharedBuckets(redis_server.url, timeout_s=5.0, renew_timeout_s=0.2)
    async with limiter(settings, shared=buckets, clock=clock) as one:
        running = asyncio.create_task(one.run())
        await ask(one, {TENANT: Limits(max_in_flight=2)})
        redis_server.freeze()
        clock.now += RENEW_S
        async with asyncio.timeout(30):
            while caplog.text.count("leases not renewed") < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert one.shares
        redis_server.thaw()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_request_larger_than_a_share_takes_the_whole_share(
    pair: list[Limiter], redis_server: RedisServer
) -> None:
    redis_server.freeze()
    assert (await ask(pair[0], {TENANT: Limits(tokens_per_minute=100)}, tokens=90)).headers == {
        "x-ratelimit-limit-tokens": "50",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    redis_server.thaw()


async def test_a_caller_that_leaves_while_redis_is_asked_leaves_nothing_open(
    pair: list[Limiter], redis_server: RedisServer
) -> None:
    limits = {TENANT: Limits(max_in_flight=1, tokens_per_minute=100)}
    asking = asyncio.create_task(ask(pair[0], limits, tokens=100))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    for _ in range(100):
        try:
            (await ask(pair[1], limits, tokens=90, lease="next")).settle(0)
            break
        except (RateLimitError, TooManyRequestsError):
            await asyncio.sleep(0.02)
    else:
        pytest.fail("still taken")
