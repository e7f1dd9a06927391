"""Why was this request slow? Its moments in order, and the part that took longest. Pure."""

from typing import Any

from adapters.ledger import Entry
from adapters.records import DEDICATED
from gateway.meter import IN_PROGRESS
from gateway.resolve import ADAPTER, MERGED

# Each part ends with the moment after it; the first begins with the request's arrival.
_PARTS = ("gateway", "queue", "adapter_load", "first_token", "generation", "end")
_REASONS = {
    "gateway": "the gateway's own work before the request had a place in the queue and after it had its adapter",
    "queue": "it waited for its turn: the engine was busy, or every LoRA slot was taken",
    "adapter_load": "its adapter had to be brought into the engine first",
    "first_token": "the engine took this long to its first token: a long prompt, or a full batch",
    "generation": "the engine took this long from its first token to its last",
    "end": "the answer was held up after its last token: a caller that reads slowly",
}


def parts_s(entry: Entry, now_s: float) -> dict[str, float]:
    """Seconds each part took. now_s: seconds after its arrival, for one that is still on its way."""
    end_s = now_s if entry.ended_s is None else entry.ended_s
    queued_s = end_s if entry.queued_s is None else entry.queued_s
    admitted_s = end_s if entry.admitted_s is None else entry.admitted_s
    loaded_s = end_s if entry.loaded_s is None else entry.loaded_s
    sent_s = end_s if entry.sent_s is None else entry.sent_s
    first_s = end_s if entry.first_s is None else entry.first_s
    last_s = end_s if entry.last_s is None or entry.ended_s is None else entry.last_s
    took = (
        queued_s + sent_s - loaded_s,
        admitted_s - queued_s,
        loaded_s - admitted_s,
        first_s - sent_s,
        last_s - first_s,
        end_s - last_s,
    )
    return {name: max(0.0, seconds) for name, seconds in zip(_PARTS, took, strict=True)}


def request_object(entry: Entry, *, now_s: float, currency: str) -> dict[str, Any]:
    """The answer of `GET /v1/requests/{id}`. now_s: Unix seconds."""
    received_s = entry.received_ms / 1000
    parts = parts_s(entry, now_s - received_s)
    longest = max(parts, key=lambda name: parts[name])
    return {
        "id": entry.request_id,
        "object": "request",
        "status": entry.outcome,
        "project_id": entry.tenant,
        "api_key_id": entry.key_id,
        "route": entry.route,
        "model": entry.requested,
        "adapter": f"{entry.model}@{entry.version}" if entry.version is not None else entry.model,
        "replica": entry.replica,
        "form": form_of(entry),
        "stream": entry.stream,
        "usage": {
            "prompt_tokens": entry.prompt_tokens,
            "cached_tokens": entry.cached_tokens,
            "completion_tokens": entry.output_tokens,
            "total_tokens": entry.prompt_tokens + entry.output_tokens,
            "estimated": entry.estimated,
        },
        "cost": {"value": entry.cost, "currency": currency},
        "timeline": [
            {"event": name, "at": round(received_s + after_s, 6), "after_ms": round(after_s * 1000, 3)}
            for name, after_s in _moments(entry)
        ],
        "parts_ms": {name: round(seconds * 1000, 3) for name, seconds in parts.items()},
        "slowest": {"part": longest, "ms": round(parts[longest] * 1000, 3), "reason": _REASONS[longest]},
        "in_progress": entry.outcome == IN_PROGRESS,
    }


def form_of(entry: Entry) -> str | None:
    """merged: on an engine of the version's own; adapter: hot-swapped beside others. None: the base, or no engine at all."""
    if entry.version is None or entry.replica is None:
        return None
    return MERGED if entry.replica.startswith(DEDICATED) else ADAPTER


def _moments(entry: Entry) -> list[tuple[str, float]]:
    found = {
        "received": 0.0,
        "queued": entry.queued_s,
        "admitted": entry.admitted_s,
        "loaded": entry.loaded_s,
        "sent": entry.sent_s,
        "first_token": entry.first_s,
        "last_token": entry.last_s,
        "ended": entry.ended_s,
    }
    return [(name, after_s) for name, after_s in found.items() if after_s is not None]
