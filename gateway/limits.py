"""What a generation request may still use: of its tenant, its key and its adapter.

Reserved before it is sent, from all of them or none, and settled when it has ended. With Redis all gateways count together;
while Redis is away each allows its share, counted in memory. A request that no shared limit touches never asks Redis.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from adapters.records import NO_LIMITS, AdapterVersion, LimitKind, Limits, LimitSubject, Snapshot
from gateway.buckets import EXACT, Answer, Ask, Buckets, Kind, suffices, wait_s
from gateway.errors import (
    BudgetSpentError,
    GatewayError,
    RateLimitError,
    RequestTooLargeError,
    SharedLimitsError,
    TooManyRequestsError,
    duration,
)
from gateway.metrics import Metrics
from gateway.settings import LimitSettings
from gateway.shared_buckets import RENEW_S, SharedBuckets
from gateway.tasks import Tasks

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # between two looks whether Redis is back
LOG_S = 1.0  # what would be refused of one tenant is logged no more often
PRUNE_S = 300.0
WORDS = {Kind.REQUESTS: "requests per min (RPM)", Kind.TOKENS: "tokens per min (TPM)"}

Spent = Callable[[LimitSubject], float]  # of a tenant or key this month, in the currency of the prices


@dataclass(frozen=True)
class Rule:
    """One limit that a request meets."""

    subject: LimitSubject
    kind: Kind
    limit: int
    shared: bool  # counted by all gateways together

    @property
    def key(self) -> str:
        return f"{self.subject.kind.value}:{self.subject.tenant}:{self.subject.name}:{self.kind.value}"


@dataclass(frozen=True)
class Rules:
    """Every limit of one tenant's requests with one key to one adapter."""

    local: tuple[Rule, ...]
    shared: tuple[Rule, ...]
    budgets: tuple[tuple[LimitSubject, float], ...]


def rules_for(
    snapshot: Snapshot,
    tenant: str,
    key_id: str,
    adapter: tuple[str, str] | None,
    *,
    defaults: Limits,
    max_open: int,
    together: bool,
) -> Rules:
    """adapter: owner and name. defaults and max_open: for tenants without limits of their own; max_open is each
    gateway's own, so that a tenant without limits costs no call. together: whether gateways count together.
    """
    subjects = [LimitSubject(LimitKind.TENANT, tenant), LimitSubject(LimitKind.KEY, tenant, key_id)]
    if adapter is not None:
        subjects.append(LimitSubject(LimitKind.ADAPTER, *adapter))
    local: list[Rule] = []
    shared: list[Rule] = []
    budgets: list[tuple[LimitSubject, float]] = []
    for subject in subjects:
        limits = snapshot.limits.get(subject, NO_LIMITS)
        if subject.kind is LimitKind.TENANT:
            limits = limits.or_else(defaults)
            if limits.max_in_flight is None:
                local.append(Rule(subject, Kind.OPEN, max_open, shared=False))
        found = {
            Kind.REQUESTS: limits.requests_per_minute,
            Kind.TOKENS: limits.tokens_per_minute,
            Kind.OPEN: limits.max_in_flight,
        }
        counted = [Rule(subject, kind, limit, together) for kind, limit in found.items() if limit is not None]
        (shared if together else local).extend(counted)
        if limits.monthly_budget is not None:
            budgets.append((subject, limits.monthly_budget))
    return Rules(tuple(local), tuple(shared), tuple(budgets))


class Grant:
    """A reservation. `settle` ends it, once; later calls do nothing."""

    def __init__(self, headers: dict[str, str], settle: Callable[[int], None]) -> None:
        self.headers = headers
        self._settle: Callable[[int], None] | None = settle

    def settle(self, used_tokens: int) -> None:
        """used_tokens: prompt and output, as far as the engine worked for them."""
        settle, self._settle = self._settle, None
        if settle is not None:
            settle(used_tokens)


class Limiter:
    """All limits of one gateway. Enter it before the first request; `run` keeps what is shared alive."""

    def __init__(
        self,
        settings: LimitSettings,
        metrics: Metrics,
        *,
        spent: Spent = lambda _: 0.0,
        shared: SharedBuckets | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: monotonic seconds. Without `shared`, limits hold for this process alone."""
        self._settings = settings
        self._defaults = settings.of_tenants
        self._metrics = metrics
        self._spent = spent
        self._local = Buckets()
        self._shared = shared
        self._shared_answers = True
        self._clock = clock
        self._tasks = Tasks()
        self._leases: dict[str, Sequence[Ask]] = {}
        self._snapshot: Snapshot | None = None
        self._rules: dict[tuple[str, str, tuple[str, str] | None], Rules] = {}
        self._logged_s: dict[str, float] = {}

    async def __aenter__(self) -> "Limiter":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.close()
        if self._shared is not None:
            await self._shared.close()

    def open_requests(self, tenant: str) -> int:
        """Those of this gateway that its own default limits."""
        return self._local.open(Rule(LimitSubject(LimitKind.TENANT, tenant), Kind.OPEN, 0, shared=False).key)

    @property
    def shares(self) -> bool:
        """Whether the gateways count together now."""
        return self._shared is not None and self._shared_answers

    async def reserve(
        self, snapshot: Snapshot, tenant: str, key_id: str, version: AdapterVersion | None, tokens: int, *, lease: str
    ) -> Grant:
        """tokens: prompt and output cap, at most; 0 where none are used. lease: a name for the request, unique.

        Raises RateLimitError, RequestTooLargeError, BudgetSpentError, TooManyRequestsError.
        """
        rules = self._rules_for(snapshot, tenant, key_id, (version.tenant, version.adapter) if version else None)
        try:
            self._check(rules, tokens)
            return await self._reserve(rules, tokens, lease)
        except (RateLimitError, RequestTooLargeError, BudgetSpentError, TooManyRequestsError) as exc:
            if not self._settings.observe_only:
                raise
            self._log_observed(exc, tenant)
            return Grant({}, lambda _: None)

    async def run(self) -> None:
        """For ever: leases are renewed, an absent Redis is looked for, full buckets are forgotten."""
        pruned_s = renewed_s = self._clock()
        while True:
            await asyncio.sleep(RETRY_S)
            now_s = self._clock()
            if now_s - pruned_s >= PRUNE_S:
                pruned_s = now_s
                self._local.drop_full(now_s)
            if self._shared is None:
                continue
            try:
                if not self._shared_answers:
                    await self._shared.ping()
                    self._note_shared(answers=True)
                elif now_s - renewed_s >= RENEW_S and await self._renew(self._shared):
                    renewed_s = now_s
            except SharedLimitsError as exc:
                self._note_shared(answers=False, reason=str(exc))

    # Parts of the above

    async def _renew(self, shared: SharedBuckets) -> bool:
        """Whether all leases are. Not in time is no sign that Redis is away: the next request asks it and finds out."""
        try:
            await shared.renew(dict(self._leases))
        except SharedLimitsError as exc:
            logger.warning("leases not renewed, tried again", extra={"leases": len(self._leases), "reason": str(exc)})
            return False
        return True

    def _rules_for(self, snapshot: Snapshot, tenant: str, key_id: str, adapter: tuple[str, str] | None) -> Rules:
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._rules.clear()
        found = self._rules.get((tenant, key_id, adapter))
        if found is None:
            found = self._rules[tenant, key_id, adapter] = rules_for(
                snapshot,
                tenant,
                key_id,
                adapter,
                defaults=self._defaults,
                max_open=self._settings.max_in_flight,
                together=self._shared is not None,
            )
        return found

    def _check(self, rules: Rules, tokens: int) -> None:
        """What no waiting helps against."""
        for subject, budget in rules.budgets:
            if self._spent(subject) >= budget:
                self._count("budget", subject)
                raise BudgetSpentError(str(subject))
        for rule in (*rules.local, *rules.shared):
            if rule.kind is Kind.TOKENS and tokens > rule.limit:
                self._count(rule.kind.value, rule.subject)
                raise RequestTooLargeError(str(rule.subject), rule.limit, tokens)

    async def _reserve(self, rules: Rules, tokens: int, lease: str) -> Grant:
        parts = [self._take_here(rules.local, tokens)]
        if rules.shared:
            try:
                parts.append(await self._take_together(rules.shared, tokens, lease))
            except BaseException:
                self._settle(parts, 0, lease)
                raise
        return Grant(headers_of(parts), lambda used: self._settle(parts, used, lease))

    def _take_here(self, rules: Sequence[Rule], tokens: int) -> "_Part":
        part = _Part.of(rules, tokens)
        return self._judged(part, self._local.reserve(part.asks, self._clock()))

    async def _take_together(self, rules: Sequence[Rule], tokens: int, lease: str) -> "_Part":
        if self._shared_answers:
            part = _Part.of(rules, tokens)
            answer = await self._ask_shared(part, lease)
            if answer is not None:
                return self._judged(replace(part, shared=True), answer)
        shares = [replace(rule, limit=max(1, rule.limit // self._settings.gateways)) for rule in rules]
        return self._take_here(shares, tokens)

    async def _ask_shared(self, part: "_Part", lease: str) -> Answer | None:
        """None when Redis does not answer."""
        asking = self._tasks.start(self._try_shared(part, lease), name="reserve")
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:  # the caller left, but what was asked for may yet be granted
            asking.add_done_callback(lambda done: self._give_back(done, part, lease))
            raise

    async def _try_shared(self, part: "_Part", lease: str) -> Answer | None:
        assert self._shared is not None  # noqa: S101 - rules are shared only then
        try:
            answer = await self._shared.reserve(part.asks, lease)
        except SharedLimitsError as exc:
            self._note_shared(answers=False, reason=str(exc))
            return None
        leased = [ask for ask in part.asks if ask.kind is Kind.OPEN]
        if answer.granted and leased:
            self._leases[lease] = leased
        return answer

    def _give_back(self, done: "asyncio.Task[Answer | None]", part: "_Part", lease: str) -> None:
        if not done.cancelled() and (answer := done.result()) is not None and answer.granted:
            self._settle([replace(part, shared=True)], 0, lease)

    def _judged(self, part: "_Part", answer: Answer) -> "_Part":
        """The part with what is left. Raises RateLimitError, TooManyRequestsError when it was not granted."""
        part = replace(part, levels=answer.levels)
        if answer.granted:
            return part
        short = [
            (wait_s(level, ask.amount, ask.limit) if ask.kind is not Kind.OPEN else -1.0, rule, ask, level)
            for rule, ask, level in zip(part.rules, part.asks, part.levels, strict=True)
            if not suffices(ask, level)
        ]
        for _, rule, _, _ in short:
            self._count(rule.kind.value, rule.subject)
        longest_s, rule, ask, level = max(short, key=lambda one: one[0])
        if ask.kind is Kind.OPEN:
            raise TooManyRequestsError(str(rule.subject), ask.limit)
        raise RateLimitError(
            f"Rate limit reached for {rule.subject} on {WORDS[rule.kind]}: Limit {ask.limit}, "
            f"Used {ask.limit - math.floor(level)}, Requested {ask.amount}.",
            kind=rule.kind.value,
            retry_after_s=longest_s,
            headers=headers_of([part]),
        )

    def _settle(self, parts: Sequence["_Part"], used_tokens: int, lease: str) -> None:
        for part in parts:
            refunds = [ask.amount - used_tokens if ask.kind is Kind.TOKENS else 0 for ask in part.asks]
            if part.shared:
                self._leases.pop(lease, None)
                self._tasks.start(self._settle_shared(part.asks, refunds, lease), name="settle")
            else:
                self._local.settle(part.asks, refunds, self._clock())

    async def _settle_shared(self, asks: Sequence[Ask], refunds: Sequence[float], lease: str) -> None:
        """What Redis does not hear of stays reserved, and is refilled like what was used."""
        assert self._shared is not None  # noqa: S101 - it granted this
        try:
            await self._shared.settle(asks, refunds, lease)
        except SharedLimitsError as exc:
            self._note_shared(answers=False, reason=str(exc))

    def _note_shared(self, *, answers: bool, reason: str = "") -> None:
        if answers is self._shared_answers:
            return
        self._shared_answers = answers
        self._metrics.limits_degraded.set(not answers)
        if answers:
            logger.info("limits are shared again")
        else:
            logger.warning("limits are this gateway's share until Redis answers", extra={"reason": reason})

    def _count(self, limit: str, subject: LimitSubject) -> None:
        enforced = "false" if self._settings.observe_only else "true"
        self._metrics.limit_refusals.labels(limit, subject.kind.value, enforced).inc()

    def _log_observed(self, exc: GatewayError, tenant: str) -> None:
        now_s = self._clock()
        if now_s - self._logged_s.get(tenant, -LOG_S) >= LOG_S:
            self._logged_s[tenant] = now_s
            logger.info("request above its limit let through", extra={"tenant": tenant, "reason": str(exc)})


@dataclass(frozen=True)
class _Part:
    """What one request asked of one set of buckets."""

    rules: tuple[Rule, ...]
    asks: tuple[Ask, ...]
    levels: tuple[float, ...] = ()
    shared: bool = False

    @classmethod
    def of(cls, rules: Sequence[Rule], tokens: int) -> "_Part":
        """tokens: no more than a limit are asked of it, as they can be more than a gateway's share."""
        met = tuple(rule for rule in rules if tokens or rule.kind is not Kind.TOKENS)
        asks = (
            Ask(rule.key, rule.kind, rule.limit, min(tokens, rule.limit) if rule.kind is Kind.TOKENS else 1)
            for rule in met
        )
        return cls(met, tuple(asks))


def headers_of(parts: Sequence[_Part]) -> dict[str, str]:
    """OpenAI's, of the limit with the least left; none for a kind that is not limited."""
    headers: dict[str, str] = {}
    for kind in (Kind.REQUESTS, Kind.TOKENS):
        found = [
            (level, ask.limit)
            for part in parts
            for ask, level in zip(part.asks, part.levels, strict=True)
            if ask.kind is kind
        ]
        if found:
            level, limit = min(found)
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(level + EXACT)))
            headers[f"x-ratelimit-reset-{kind}"] = duration(wait_s(level, limit, limit))
    return headers
