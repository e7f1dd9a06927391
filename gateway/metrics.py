"""Prometheus metrics of the gateway: few labels, every objective a bucket edge, no key, prompt or request id anywhere."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.gaps import EDGES_S as TOKEN_SECONDS
from gateway.gaps import GapHistogram

# Edges at the objectives people set, so that a share under an objective is counted and not interpolated.
SECONDS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
LAG_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
OTHER = "_other"  # no adapter and no tenant is called so: names begin with a letter or a digit


# Of each engine, as the gateway sees it at the time of the scrape.
ENGINE_GAUGES = {
    "ready": "1 when it takes requests.",
    "in_flight_requests": "Generation requests it works on.",
    "waiting_requests": "Generation requests that wait for their turn.",
    "resident_adapters": "Adapters it holds.",
    "slots": "Adapters it can compute with at once.",
    "leased_adapters": "Adapters that requests hold now, or wait to hold.",
    "breaker_open": "1 while it is not asked because it failed repeatedly; 0.5 while a trial is due.",
    "drain_rate": "Turns that end a second while somebody waits; 0 before the first.",
}


class Names:
    """Values of one label: the first so many keep their names, all later ones share `_other`. Pages stay of a bounded size."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(name)
        return name


@dataclass(frozen=True)
class Metrics:
    """One gateway's metrics in a registry of their own, so that two gateways fit in one process."""

    registry: CollectorRegistry
    adapters: Names
    tenants: Names
    requests: Counter
    duration: Histogram
    ttft: Histogram
    time_per_token: Histogram
    gaps: GapHistogram
    max_gap: Histogram
    queue_wait: Histogram
    load_wait: Histogram
    tokens: Counter
    tenant_tokens: Counter
    engines: dict[str, Gauge]
    lookups: Counter
    evictions: Counter
    load_stall: Histogram
    canary_failures: Counter
    starts: Counter
    disconnects: Counter
    refusals: Counter
    loop_lag: Histogram
    limit_refusals: Counter
    limits_degraded: Gauge
    failovers: Counter
    form_requests: Counter
    form_ttft: Histogram
    usage_failures: Counter
    usage_lost: Counter
    usage_waiting: Gauge

    @classmethod
    def create(cls, max_adapters: int = 50, max_tenants: int = 200) -> "Metrics":
        """max_adapters, max_tenants: values of these labels; see `Names`."""
        registry = CollectorRegistry()
        gaps = GapHistogram("gateway_inter_token_latency_seconds", "Gaps between the tokens of streams.", "adapter")
        registry.register(gaps)

        def histogram(name: str, text: str, labels: list[str], buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"gateway_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"gateway_{name}", text, labels, registry=registry)

        return cls(
            registry=registry,
            adapters=Names(max_adapters),
            tenants=Names(max_tenants),
            requests=counter("requests", "Generation requests by outcome.", ["route", "adapter", "outcome"]),
            duration=histogram("request_duration_seconds", "Arrival to last byte.", ["adapter", "stream"]),
            ttft=histogram("time_to_first_token_seconds", "Arrival to first output.", ["adapter", "adapter_state"]),
            time_per_token=histogram(
                "time_per_output_token_seconds", "(last - first) / (events - 1).", ["adapter"], TOKEN_SECONDS
            ),
            gaps=gaps,
            max_gap=histogram("stream_max_gap_seconds", "Longest gap within one stream.", [], TOKEN_SECONDS),
            queue_wait=histogram("queue_wait_seconds", "Wait for a turn.", []),
            load_wait=histogram("adapter_load_seconds", "What a request waited for its adapter's load.", []),
            tokens=counter("tokens", "Tokens by adapter.", ["adapter", "type"]),
            tenant_tokens=counter("tenant_tokens", "Tokens by tenant.", ["tenant", "type"]),
            engines={
                name: Gauge(f"gateway_engine_{name}", text, ["engine"], registry=registry)
                for name, text in ENGINE_GAUGES.items()
            },
            failovers=counter(
                "failovers", "Requests given to another engine, or again, by who failed them.", ["engine"]
            ),
            form_requests=counter(
                "form_requests",
                "Requests to versions with an engine of their own, by who answered: merged or adapter.",
                ["adapter", "form", "outcome"],
            ),
            form_ttft=histogram("form_time_to_first_token_seconds", "Of the same, by form.", ["adapter", "form"]),
            lookups=counter("adapter_lookups", "Wanted adapters that were loaded (hit) or not.", ["engine", "result"]),
            evictions=counter("adapter_evictions", "Adapters taken out of an engine.", ["engine", "reason"]),
            load_stall=histogram(
                "load_stall_seconds", "How long one load of an adapter stopped the engine's streams.", ["engine"]
            ),
            canary_failures=counter("canary_failures", "Looks at an engine that it did not pass.", ["engine"]),
            starts=counter("engine_starts", "Times an engine came up, the first included.", ["engine"]),
            disconnects=counter("client_disconnects", "Callers that left before the end.", ["stage"]),
            refusals=counter(
                "refusals", "Generation requests refused before an engine was asked.", ["tenant", "reason"]
            ),
            loop_lag=histogram("event_loop_lag_seconds", "How late the event loop wakes.", [], LAG_SECONDS),
            limit_refusals=counter(
                "limit_refusals", "Requests above a limit; let through where not enforced.", ["limit", "on", "enforced"]
            ),
            limits_degraded=Gauge(
                "gateway_limits_degraded", "1 while each gateway counts for itself.", registry=registry
            ),
            usage_failures=counter("usage_write_failures", "Attempts to write ledger rows that failed.", ["where"]),
            usage_lost=counter("usage_lost_rows", "Ledger rows that could not be kept.", []),
            usage_waiting=Gauge(
                "gateway_usage_waiting_rows", "Ledger rows not in the database yet.", registry=registry
            ),
        )

    def note_engine(self, engine: str, values: Mapping[str, float]) -> None:
        """values: of each of ENGINE_GAUGES."""
        for name, value in values.items():
            self.engines[name].labels(engine).set(value)

    def forget_engine(self, engine: str) -> None:
        """One that is gone for good."""
        for gauge in self.engines.values():
            with contextlib.suppress(KeyError):
                gauge.remove(engine)

    def exposition(self) -> bytes:
        """Takes some milliseconds a thousand series: not for the event loop."""
        return generate_latest(self.registry)
