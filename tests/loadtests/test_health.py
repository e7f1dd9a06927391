from collections.abc import Sequence

import pytest

from loadtests.health import BEAT_S, Pulse, assess, cpu_s
from loadtests.record import Record
from loadtests.scenario import HealthLimits
from tests.loadtests.factories import WINDOWS, make_record

RECORDS = [make_record(i) for i in range(100)]


def steady_pulse(*, cpu_share: float = 0.1) -> Pulse:
    pulse = Pulse()
    for beat in range(round(12 / BEAT_S)):
        pulse.note(beat * BEAT_S, beat * BEAT_S + 0.001, beat * BEAT_S * cpu_share)
    return pulse


def faults(
    records: list[Record] = RECORDS,
    pulses: Sequence[Pulse] = (),
    *,
    scheduled: int = 100,
    tightest_s: float | None = None,
) -> str:
    health = assess(
        records, pulses or [steady_pulse()], WINDOWS, scheduled=scheduled, limits=HealthLimits(), tightest_s=tightest_s
    )
    return "; ".join(health.faults)


def test_a_generator_that_keeps_up_is_healthy() -> None:
    assert faults() == ""


def test_requests_that_leave_late_make_it_unhealthy() -> None:
    late = [make_record(i, sent_s=1.0 + i * 0.01 + 0.02) for i in range(3)]
    assert "send lag P99 20.0 ms, allowed 5 ms" in faults(RECORDS[3:] + late)


def test_the_tightest_objective_narrows_the_lag_allowed() -> None:
    assert "2% of the tightest objective" in faults(tightest_s=0.02)
    assert faults(tightest_s=0.2) == ""


def test_a_stall_of_the_loop_weighs_as_long_as_it_lasted() -> None:
    pulse = steady_pulse()
    pulse.note(5.0, 6.0, 1.0)  # one late beat among 1200, but a second of blindness
    assert "loop lag P99" in faults(pulses=[pulse])
    assert max(pulse.lag_s) == pytest.approx(1.0)


def test_a_client_that_uses_its_core_up_is_unhealthy() -> None:
    assert "client used 90% of a core" in faults(pulses=[steady_pulse(cpu_share=0.9)])


def test_load_that_was_not_offered_makes_it_unhealthy() -> None:
    assert "sent 100 of 200" in faults(scheduled=200)


def test_lag_outside_the_measured_phases_does_not_matter() -> None:
    assert faults([*RECORDS, make_record(0, phase="warm-up", sent_s=9.0)]) == ""


def test_of_several_processes_the_worst_counts_and_each_has_a_core_of_its_own() -> None:
    assert faults(pulses=[steady_pulse(cpu_share=0.6)] * 4) == ""
    assert "client used 90% of a core" in faults(pulses=[steady_pulse(), steady_pulse(cpu_share=0.9), steady_pulse()])
    stalled = steady_pulse()
    stalled.note(5.0, 6.0, 1.0)
    assert "loop lag P99" in faults(pulses=[steady_pulse(), stalled])
    assert cpu_s([steady_pulse(cpu_share=0.5)] * 2) == pytest.approx(12, rel=0.01)


def test_the_further_turns_of_a_conversation_make_up_for_no_scheduled_request() -> None:
    turns = [make_record(i, id=f"steady-{i}.t2", turn=2) for i in range(100)]
    assert "sent 100 of 200" in faults([*RECORDS, *turns], scheduled=200)
