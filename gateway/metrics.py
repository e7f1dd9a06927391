"""Prometheus metrics of the gateway: few labels, every objective a bucket edge, no key, prompt or request id anywhere."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Edges at the objectives people set, so that a share under an objective is counted and not interpolated.
SECONDS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


# Of each engine, as the gateway sees it at the time of the scrape.
ENGINE_GAUGES = {
    "ready": "1 when it takes requests.",
    "in_flight_requests": "Generation requests it works on.",
    "waiting_requests": "Generation requests that wait for their turn.",
    "resident_adapters": "Adapters it holds.",
    "slots": "Adapters it can compute with at once.",
}


@dataclass(frozen=True)
class Metrics:
    """One gateway's metrics in a registry of their own, so that two gateways fit in one process."""

    registry: CollectorRegistry
    requests: Counter
    duration: Histogram
    ttft: Histogram
    time_per_token: Histogram
    max_gap: Histogram
    queue_wait: Histogram
    load_wait: Histogram
    tokens: Counter
    tenant_tokens: Counter
    engines: dict[str, Gauge]
    disconnects: Counter

    @classmethod
    def create(cls) -> "Metrics":
        registry = CollectorRegistry()

        def histogram(name: str, text: str, labels: list[str], buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"gateway_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"gateway_{name}", text, labels, registry=registry)

        return cls(
            registry=registry,
            requests=counter("requests", "Generation requests by outcome.", ["route", "adapter", "outcome"]),
            duration=histogram("request_duration_seconds", "Arrival to last byte.", ["adapter", "stream"]),
            ttft=histogram("time_to_first_token_seconds", "Arrival to first output.", ["adapter", "adapter_state"]),
            time_per_token=histogram(
                "time_per_output_token_seconds", "(last - first) / (events - 1).", ["adapter"], TOKEN_SECONDS
            ),
            max_gap=histogram("stream_max_gap_seconds", "Longest gap within one stream.", [], TOKEN_SECONDS),
            queue_wait=histogram("queue_wait_seconds", "Wait for a turn.", []),
            load_wait=histogram("adapter_load_seconds", "What a request waited for its adapter's load.", []),
            tokens=counter("tokens", "Tokens by adapter.", ["adapter", "type"]),
            tenant_tokens=counter("tenant_tokens", "Tokens by tenant.", ["tenant", "type"]),
            engines={
                name: Gauge(f"gateway_engine_{name}", text, ["engine"], registry=registry)
                for name, text in ENGINE_GAUGES.items()
            },
            disconnects=counter("client_disconnects", "Callers that left before the end.", ["stage"]),
        )

    def note_engine(self, engine: str, values: Mapping[str, float]) -> None:
        """values: of each of ENGINE_GAUGES."""
        for name, value in values.items():
            self.engines[name].labels(engine).set(value)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
