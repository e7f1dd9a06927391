"""Was each tenant kept to its request limit, and to nothing tighter? A token bucket of our own says. Pure.

The oracle is a bucket of `burst` tokens, full when the run begins and refilled with requests_per_minute / 60 tokens a
second. It follows what the server admitted, so that one early or late decision does not make all later ones look wrong.

When the server decided is known only roughly: between the request's leaving and the slack later (SLACK_S, or the
longest that a refusal was seen to take). Each bound below holds for every choice of instants within that time, so
whatever is counted as a fault is one:

    leaked           admitted, though even a bucket with the slack's refill on top would have been empty
    falsely refused  although a token was there even if all that left within the slack came first
    too short        told to come back before even the fullest possible bucket has a token
    too long         told to wait LONG_FACTOR times what the emptiest possible bucket needs, and LONG_EXTRA_S on top

A refusal is the bucket's when its error code says so: what was refused for another reason, such as too many requests at
once, may have taken a token and is not judged.

The tenant's key must not be used by others, and its bucket must have had the time to fill before the run.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtests.record import Outcome, Record
from loadtests.scenario import Limit
from loadtests.slo import Verdict
from loadtests.stats import Distribution, describe

SLACK_S = 0.25  # a limiter on a loopback decides within milliseconds; a crowded machine was seen to add a tenth
LONG_FACTOR = 2.0
LONG_EXTRA_S = 1.0  # Retry-After counts whole seconds
EXACT_S = 1e-6  # instants closer than this are one: sums of refills are not exact
_CODE = re.compile(r"http 429: (\w+)(?:: |$)")  # as the client writes it: code and message of the error object


@dataclass(frozen=True)
class TenantAudit:
    """What became of one tenant's requests in the audited phases."""

    tenant: str
    limit: Limit | None  # None: the scenario gives none, so it must never be refused
    offered: int
    admitted: int
    refused: int
    allowed: int  # what the oracle, deciding for itself, admits of the same requests
    leaked: int
    falsely_refused: int
    told: int  # refusals with a Retry-After
    too_short: int
    too_long: int
    slack_s: float  # within which the server was taken to decide
    refusal: Distribution | None  # sent to refused: latency of the 429 itself
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    tenants: tuple[TenantAudit, ...]

    @property
    def verdict(self) -> Verdict:
        if any(row.faults for row in self.tenants):
            return Verdict.MISSED
        tried = any(row.allowed < row.offered for row in self.tenants)
        return Verdict.PASS if tried else Verdict.UNDECIDED

    @property
    def reasons(self) -> list[str]:
        """Why it is not a pass."""
        if self.verdict is Verdict.UNDECIDED:
            return ["rate limits: no tenant asked for more than its limit, so nothing was tried"]
        return [f"rate limit of tenant {row.tenant}: {fault}" for row in self.tenants for fault in row.faults]


def audit_limits(
    records: Sequence[Record], phases: Sequence[str], limits: Mapping[str, Limit], *, seed: int = 0
) -> Audit | None:
    """records: of the whole run, as earlier requests took tokens too. phases: the audited ones. None when none ran."""
    sent = sorted((record for record in records if record.sent_s is not None), key=_sent_s)
    audited = [record for record in sent if record.phase in phases]
    rows = []
    for tenant in sorted({record.tenant for record in audited}, key=lambda name: (name not in limits, name)):
        own = [record for record in audited if record.tenant == tenant]
        before = [record for record in sent if record.tenant == tenant and record.phase not in phases]
        rows.append(_audit_tenant(tenant, own, before, limits.get(tenant), seed))
    return Audit(tuple(rows)) if rows else None


def _audit_tenant(
    tenant: str, own: Sequence[Record], others: Sequence[Record], limit: Limit | None, seed: int
) -> TenantAudit:
    """own: its audited requests; others: those of other phases, which only move the bucket."""
    refused = [record for record in own if _was_refused(record, limit)]
    told = [record for record in refused if record.retry_after_s is not None]
    found = _against_bucket(own, others, limit) if limit else _Findings(allowed=len(own), falsely_refused=len(refused))
    return TenantAudit(
        tenant=tenant,
        limit=limit,
        offered=len(own),
        admitted=sum(map(_was_admitted, own)),
        refused=len(refused),
        allowed=found.allowed,
        leaked=found.leaked,
        falsely_refused=found.falsely_refused,
        told=len(told),
        too_short=len(found.short_by_s),
        too_long=len(found.long_by_s),
        slack_s=found.slack_s,
        refusal=describe([r.end_s - _sent_s(r) for r in refused if r.end_s is not None], seed),
        faults=tuple(_faults(found, limit, refused)),
    )


@dataclass(frozen=True)
class _Findings:
    allowed: int
    leaked: int = 0
    falsely_refused: int = 0
    short_by_s: Sequence[float] = ()
    long_by_s: Sequence[float] = ()
    slack_s: float = SLACK_S


def _against_bucket(own: Sequence[Record], others: Sequence[Record], limit: Limit) -> _Findings:
    per_s = limit.requests_per_minute / 60
    refused = [record for record in own if _was_refused(record, limit)]
    slack_s = max([SLACK_S, *(r.headers_s - _sent_s(r) for r in refused if r.headers_s is not None)])
    capacity = limit.burst + slack_s * per_s
    audited = {record.id for record in own}
    sent = sorted([*own, *others], key=_sent_s)

    ideal = _Bucket(limit.burst, per_s)
    allowed = sum([ideal.try_take(_sent_s(record)) and record.id in audited for record in sent])

    # Fullest: only what was surely admitted, and no more of it than fits, took a token.
    wide = _Bucket(capacity, per_s)
    admitted = [(record, wide.try_take(_sent_s(record))) for record in sent if _was_admitted(record)]
    leaked = sum(not fits and record.id in audited for record, fits in admitted)
    fullest = [_sent_s(record) for record, fits in admitted if fits]
    at_s = [_sent_s(record) for record in refused]
    most = _levels(_Bucket(capacity, per_s), fullest, [s - slack_s for s in at_s], [s + slack_s for s in at_s])

    # Emptiest: whatever was not refused may have taken one, as late as it can have, and those around it all before.
    takes_s = [_sent_s(record) for record in sent if not _was_refused(record, limit)]
    latest_s = [s + slack_s + EXACT_S for s in takes_s]
    surely = _levels(_Bucket(limit.burst, per_s), latest_s, at_s, at_s)
    least = [
        level - (bisect_right(takes_s, s + slack_s) - bisect_right(latest_s, s))
        for s, level in zip(at_s, surely, strict=True)
    ]
    short_by_s, long_by_s, false = [], [], 0
    for record, high, low in zip(refused, most, least, strict=True):
        false += low >= 1
        if record.retry_after_s is not None:
            shortest_s = max(0.0, (1 - high) / per_s)
            longest_s = max(0.0, (1 - low) / per_s)
            if record.retry_after_s < shortest_s:
                short_by_s.append(shortest_s - record.retry_after_s)
            if record.retry_after_s > LONG_FACTOR * longest_s + LONG_EXTRA_S:
                long_by_s.append(record.retry_after_s - longest_s)
    return _Findings(allowed, leaked, false, short_by_s, long_by_s, slack_s)


@dataclass
class _Bucket:
    """Full at first."""

    capacity: float
    per_s: float
    tokens: float = float("inf")
    at_s: float = 0.0

    def level(self, at_s: float) -> float:
        return min(self.capacity, self.tokens + self.per_s * (at_s - self.at_s))

    def take(self, at_s: float) -> None:
        self.tokens, self.at_s = self.level(at_s) - 1, at_s

    def try_take(self, at_s: float) -> bool:
        if self.level(at_s) < 1 - 1e-9:  # at exactly its rate, sums of refills are not exact
            return False
        self.take(at_s)
        return True


def _levels(bucket: _Bucket, takes_s: Sequence[float], until_s: Sequence[float], at_s: Sequence[float]) -> list[float]:
    """For each pair of instants, both ascending: the level at `at` after the takes not later than `until`."""
    found, taken = [], 0
    for until, at in zip(until_s, at_s, strict=True):
        while taken < len(takes_s) and takes_s[taken] <= until:
            bucket.take(takes_s[taken])
            taken += 1
        found.append(bucket.level(at))
    return found


def _faults(found: _Findings, limit: Limit | None, refused: Sequence[Record]) -> list[str]:
    if limit is None:
        return [f"refused {len(refused)} times without having one ({refused[0].error})"] if refused else []
    faults = []
    if found.leaked:
        faults.append(
            f"{found.leaked} requests let through above {limit.requests_per_minute:g} a minute, burst {limit.burst}"
        )
    if found.falsely_refused:
        faults.append(f"{found.falsely_refused} requests refused although it was within its limit")
    if found.short_by_s:
        faults.append(f"Retry-After too short {len(found.short_by_s)} times, by up to {max(found.short_by_s):.1f} s")
    if found.long_by_s:
        faults.append(f"Retry-After too long {len(found.long_by_s)} times, by up to {max(found.long_by_s):.1f} s")
    return faults


def _was_refused(record: Record, limit: Limit | None) -> bool:
    """By the bucket. A tenant without a limit must not be refused at all; an error without a code may be the bucket's."""
    if record.outcome is not Outcome.REFUSED:
        return False
    code = _CODE.match(record.error)
    return limit is None or code is None or code[1] == limit.code


def _was_admitted(record: Record) -> bool:
    """Surely. A request without an answer, or with another error, may have been given up before the limiter."""
    return record.status == 200


def _sent_s(record: Record) -> float:
    return record.sent_s if record.sent_s is not None else record.intended_s
