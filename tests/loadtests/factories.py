"""Records, scenarios and runs made by hand."""

from collections.abc import Sequence
from typing import Any

from loadtests.record import Health, Outcome, PhaseWindow, Record, Run
from loadtests.scenario import Scenario

WINDOWS = (PhaseWindow("warm-up", False, 0.0, 1.0), PhaseWindow("steady", True, 1.0, 11.0))
HEALTHY = Health(0.001, 0.001, 0.1, 100, 100, ())
EASY_HEALTH = {
    "send_lag_p99_ms": 9e5,
    "loop_lag_p99_ms": 9e5,
    "objective_share": 9e5,
    "cpu_share": 9,
    "offered_share": 0.01,
}


def make_scenario(**fields: Any) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "test",
            "load": {"kind": "constant", "rate_per_s": 40},
            "phases": [{"name": "steady", "duration_s": 1}],
            "sample_floor": 10,
            "health": EASY_HEALTH,
            "drain_s": 5,
            **fields,
        }
    )


def make_record(number: int, *, ttft_s: float = 0.1, outcome: Outcome = Outcome.OK, **fields: Any) -> Record:
    """Intended at 1 s and on, sent 1 ms later, three chunks 10 ms apart."""
    at_s = 1.0 + number * 0.01
    content_s = [at_s + ttft_s + i * 0.01 for i in range(3)] if outcome is Outcome.OK else []
    made: dict[str, Any] = {
        "id": f"steady-{number}",
        "phase": "steady",
        "tenant": "default",
        "adapter": "support",
        "stream": True,
        "intended_s": at_s,
        "sent_s": at_s + 0.001,
        "headers_s": at_s + 0.002,
        "content_s": content_s,
        "end_s": at_s + ttft_s + 0.03,
        "outcome": outcome,
        "status": 200,
        "output_tokens": 3,
        **fields,
    }
    return Record(**made)


def make_run(records: Sequence[Record], *, health: Health = HEALTHY, interrupted: bool = False, **scenario: Any) -> Run:
    return Run(
        scenario=make_scenario(**scenario).model_dump(mode="json"),
        url="http://test",
        started_at="2026-01-01T00:00:00+00:00",
        interrupted=interrupted,
        models={"default": ("support", "legal")},
        windows=WINDOWS,
        health=health,
        environment={},
        records=tuple(records),
    )
