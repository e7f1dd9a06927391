"""The buckets that all gateways share, in Redis: every limit of a request in one call, all of them or none.

The arithmetic is that of `gateway.buckets`, on Redis' own clock. Open requests are leases that their gateway renews, so those
of a killed one end by themselves. Nothing is kept longer than it takes a bucket to be full again.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.buckets import Answer, Ask
from gateway.errors import SharedLimitsError

PREFIX = "lorikeet:{limits}:"  # in braces: on a cluster all of them lie on one node, as a script needs it
LEASE_S = 30.0  # an open request of a gateway that was killed counts so long
RENEW_S = 10.0
RENEW_TIMEOUT_S = 2.0  # nobody waits for it, and a lease that was not renewed lasts for several more tries
RENEWED_AT_ONCE = 500  # leases a call; Redis does nothing else for the millisecond or so that it takes
CONNECTIONS = 32  # a call holds one for a fraction of a millisecond

_COMMON = """
local now = tonumber(ARGV[1])
if now < 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local id, lease, window = ARGV[2], tonumber(ARGV[3]), 60.0
local function arguments(index)
  return ARGV[1 + 3 * index], tonumber(ARGV[2 + 3 * index]), tonumber(ARGV[3 + 3 * index])
end
local function level_of(key, limit)
  local found = redis.call('HMGET', key, 'level', 'at')
  if not found[1] then return limit end
  return math.min(limit, tonumber(found[1]) + math.max(0.0, now - tonumber(found[2])) * limit / window)
end
local function store(key, level)
  redis.call('HSET', key, 'level', string.format('%.17g', level), 'at', string.format('%.17g', now))
  redis.call('PEXPIRE', key, 120000)
end
"""
_RESERVE = (
    _COMMON
    + """
local levels, granted = {}, 1
for index, key in ipairs(KEYS) do
  local kind, limit, amount = arguments(index)
  if kind == 'open' then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.17g', now))
    levels[index] = redis.call('ZCARD', key)
    if levels[index] + amount > limit then granted = 0 end
  else
    levels[index] = level_of(key, limit)
    if levels[index] < amount - 1e-9 then granted = 0 end
  end
end
for index, key in ipairs(KEYS) do
  local kind, limit, amount = arguments(index)
  if granted == 1 and kind == 'open' then
    redis.call('ZADD', key, string.format('%.17g', now + lease), id)
    redis.call('PEXPIRE', key, math.ceil(lease * 1000))
    levels[index] = levels[index] + amount
  elseif granted == 1 then
    levels[index] = levels[index] - amount
    store(key, levels[index])
  end
  levels[index] = string.format('%.17g', levels[index])
end
return {granted, unpack(levels)}
"""
)
_SETTLE = (
    _COMMON
    + """
for index, key in ipairs(KEYS) do
  local kind, limit, refund = arguments(index)
  if kind == 'open' then
    redis.call('ZREM', key, id)
  elseif refund ~= 0 then
    store(key, math.max(-limit, math.min(limit, level_of(key, limit) + refund)))
  end
end
"""
)
_RENEW = (
    _COMMON
    + """
for index, key in ipairs(KEYS) do
  redis.call('ZADD', key, 'XX', string.format('%.17g', now + lease), ARGV[3 + index])
  redis.call('PEXPIRE', key, math.ceil(lease * 1000))
end
"""
)


class SharedBuckets:
    """A connection to Redis. Every method raises SharedLimitsError when it does not answer in time."""

    def __init__(self, url: str, *, timeout_s: float, renew_timeout_s: float = RENEW_TIMEOUT_S) -> None:
        """Connects on first use. renew_timeout_s: instead of timeout_s, for each call that renews leases.

        Raises SharedLimitsError for an address that is none, or without the client.
        """
        try:
            import redis.asyncio
            from redis.exceptions import RedisError
        except ModuleNotFoundError as exc:
            raise SharedLimitsError("Shared limits need the Redis client: pip install 'lorikeet[redis]'") from exc
        self._errors = (RedisError, OSError, TimeoutError)
        self._timeout_s = timeout_s
        self._renew_timeout_s = renew_timeout_s
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=CONNECTIONS, timeout=None)
            self._redis: Any = redis.asyncio.Redis.from_pool(pool)
        except ValueError as exc:
            raise SharedLimitsError(f"limits.redis_url: {exc}") from exc
        self._reserve, self._settle, self._renew = map(self._redis.register_script, (_RESERVE, _SETTLE, _RENEW))

    async def close(self) -> None:
        await self._redis.aclose()

    async def ping(self) -> None:
        await self._within(self._redis.ping(), self._timeout_s)

    async def reserve(self, asks: Sequence[Ask], lease: str, *, now_s: float = -1.0) -> Answer:
        """lease: names the request among the open ones. now_s: instead of Redis' clock."""
        amounts = [ask.amount for ask in asks]
        granted, *levels = await self._call(self._reserve, asks, amounts, lease, now_s)
        return Answer(granted == 1, tuple(map(float, levels)))

    async def settle(self, asks: Sequence[Ask], refunds: Sequence[float], lease: str, *, now_s: float = -1.0) -> None:
        await self._call(self._settle, asks, refunds, lease, now_s)

    async def renew(self, leases: Mapping[str, Sequence[Ask]], *, now_s: float = -1.0) -> None:
        """leases: what each open request asked. Many in one call: hundreds at once would each wait for all the others."""
        held = [(PREFIX + ask.key, lease) for lease, asks in leases.items() for ask in asks]
        for place in range(0, len(held), RENEWED_AT_ONCE):
            some = held[place : place + RENEWED_AT_ONCE]
            arguments: list[Any] = [repr(now_s), "", LEASE_S, *(lease for _, lease in some)]
            await self._within(self._renew(keys=[key for key, _ in some], args=arguments), self._renew_timeout_s)

    async def _call(
        self, script: Any, asks: Sequence[Ask], amounts: Sequence[float], lease: str, now_s: float
    ) -> list[Any]:
        arguments: list[Any] = [repr(now_s), lease, LEASE_S]
        for ask, amount in zip(asks, amounts, strict=True):
            arguments += (ask.kind.value, ask.limit, repr(amount))
        found = await self._within(script(keys=[PREFIX + ask.key for ask in asks], args=arguments), self._timeout_s)
        return found or []

    async def _within(self, call: Any, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except self._errors as exc:
            raise SharedLimitsError(f"Redis did not answer: {type(exc).__name__}: {exc}") from exc
