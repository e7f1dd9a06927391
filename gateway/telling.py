"""What is told of a generation request: counters, times, and one line of the log. Never what was asked or answered."""

import logging

from adapters.ledger import Entry
from gateway.errors import DeadlineUnmetError, error_object_for
from gateway.gaps import Gaps
from gateway.metrics import Metrics

logger = logging.getLogger(__name__)

BASE = "_base"  # the label `adapter` of requests without one
NOBODY = "_unknown"  # the label `tenant` of requests without a valid key


def tell_ended(
    entry: Entry, metrics: Metrics, *, gaps: Gaps, queue_s: float, load_s: float, failure: BaseException | None
) -> None:
    """queue_s, load_s: waits over all engines it was given to. failure: why it was not answered, or not to its end."""
    adapter = BASE if entry.version is None else metrics.adapters.label(entry.model)
    tenant, ended_s = metrics.tenants.label(entry.tenant), entry.ended_s or 0.0
    metrics.requests.labels(entry.route, adapter, entry.outcome).inc()
    metrics.duration.labels(adapter, "true" if entry.stream else "false").observe(ended_s)
    metrics.queue_wait.observe(queue_s)
    if load_s:
        metrics.load_wait.observe(load_s)
    if entry.first_s is not None:
        metrics.ttft.labels(adapter, "cold" if load_s else "warm").observe(entry.first_s)
        if gaps.count and entry.last_s is not None:
            metrics.time_per_token.labels(adapter).observe((entry.last_s - entry.first_s) / gaps.count)
            metrics.max_gap.observe(gaps.longest_s)
            metrics.gaps.add(adapter, gaps)
    for kind, tokens in (
        ("input", entry.prompt_tokens),
        ("cached", entry.cached_tokens),
        ("output", entry.output_tokens),
    ):
        if tokens:
            metrics.tokens.labels(adapter, kind).inc(tokens)
            metrics.tenant_tokens.labels(tenant, kind).inc(tokens)
    if failure is not None and entry.sent_s is None:
        metrics.refusals.labels(tenant, reason_of(failure)).inc()
    if logger.isEnabledFor(logging.INFO):
        logger.info("request", extra=facts_of(entry, queue_s=queue_s, load_s=load_s))


def tell_form(entry: Entry, metrics: Metrics, form: str) -> None:
    """Which form of a version answered, where it has an engine of its own."""
    adapter = metrics.adapters.label(entry.model)
    metrics.form_requests.labels(adapter, form, entry.outcome).inc()
    if entry.first_s is not None:
        metrics.form_ttft.labels(adapter, form).observe(entry.first_s)


def tell_refused(
    metrics: Metrics, failure: Exception, *, request_id: str, route: str, tenant: str | None, key_id: str | None
) -> None:
    """One that ended before its model was known. tenant, key_id: None without a valid key."""
    reason = reason_of(failure)
    metrics.refusals.labels(metrics.tenants.label(tenant) if tenant else NOBODY, reason).inc()
    facts = {"request_id": request_id, "route": route, "tenant": tenant, "key_id": key_id, "reason": reason}
    logger.info("request refused", extra=facts)


def reason_of(failure: BaseException) -> str:
    """The error's code; callers are told the same code for a deadline as for a full queue, operators are not."""
    return "deadline" if isinstance(failure, DeadlineUnmetError) else error_object_for(failure).code


def facts_of(entry: Entry, *, queue_s: float, load_s: float) -> dict[str, str | int | float | bool | None]:
    return {
        "request_id": entry.request_id,
        "route": entry.route,
        "tenant": entry.tenant,
        "key_id": entry.key_id,
        "adapter": entry.model if entry.version is None else f"{entry.model}@{entry.version}",
        "engine": entry.replica,
        "stream": entry.stream,
        "outcome": entry.outcome,
        "prompt_tokens": entry.prompt_tokens,
        "cached_tokens": entry.cached_tokens,
        "output_tokens": entry.output_tokens,
        "queue_s": round(queue_s, 4),
        "load_s": round(load_s, 4),
        "first_token_s": None if entry.first_s is None else round(entry.first_s, 4),
        "duration_s": round(entry.ended_s or 0.0, 4),
    }
