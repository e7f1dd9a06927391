from hypothesis import given
from hypothesis import strategies as st

from loadtests.search import Limits, Outcome, Probe, at_rate, next_step
from loadtests.slo import Verdict
from tests.loadtests.factories import make_scenario

LIMITS = Limits(start=1.0, lowest=0.125, highest=64.0, precision=0.1)


def searched(*verdicts_at: tuple[float, Verdict]) -> float | Outcome:
    return next_step([Probe(rate, verdict, reasons=("few",)) for rate, verdict in verdicts_at], LIMITS)


def run(capacity: float) -> tuple[list[Probe], Outcome]:
    """Against a server that holds up to exactly `capacity`."""
    probes: list[Probe] = []
    while not isinstance(step := next_step(probes, LIMITS), Outcome):
        probes.append(Probe(step, Verdict.PASS if step <= capacity else Verdict.MISSED))
        assert len(probes) < 40
    return probes, step


@given(st.floats(0.125, 63.9))
def test_the_capacity_lies_between_what_passed_and_what_missed_within_the_precision(capacity: float) -> None:
    _, outcome = run(capacity)
    assert outcome.resolved
    assert outcome.exit_code == 0
    assert outcome.passed is not None
    assert outcome.missed is not None
    assert outcome.passed.rate_per_s <= capacity < outcome.missed.rate_per_s
    assert outcome.missed.rate_per_s <= outcome.passed.rate_per_s * 1.1 + 1e-9


def test_a_server_that_never_holds_is_a_missed_objective() -> None:
    probes, outcome = run(0.1)
    assert probes[-1].rate_per_s == LIMITS.lowest
    assert (outcome.resolved, outcome.exit_code) == (False, 1)


def test_a_server_that_always_holds_is_unresolved_with_a_lower_bound() -> None:
    _, outcome = run(1000)
    assert (outcome.resolved, outcome.exit_code) == (False, 3)
    assert "at least 64" in outcome.reason


def test_an_undecided_rate_is_tried_twice_and_then_unresolved() -> None:
    assert searched((1, Verdict.UNDECIDED)) == 1
    outcome = searched((1, Verdict.UNDECIDED), (1, Verdict.UNDECIDED))
    assert isinstance(outcome, Outcome)
    assert (outcome.exit_code, outcome.reason) == (3, "1/s stayed undecided: few")


def test_a_generator_that_cannot_keep_up_ends_the_search_as_void() -> None:
    outcome = searched((1, Verdict.PASS), (2, Verdict.VOID))
    assert isinstance(outcome, Outcome)
    assert outcome.exit_code == 4


def test_a_wrong_answer_ends_the_search_whatever_held_before() -> None:
    wrong = Probe(2, Verdict.MISSED, reasons=("an answer belonged to somebody else",), wrong=True)
    outcome = next_step([Probe(1, Verdict.PASS), wrong], LIMITS)
    assert isinstance(outcome, Outcome)
    assert (outcome.resolved, outcome.exit_code) == (False, 1)
    assert "somebody else" in outcome.reason


def test_an_interrupted_probe_ends_the_search_unresolved() -> None:
    outcome = next_step([Probe(1, Verdict.PASS), Probe(2, Verdict.UNDECIDED, interrupted=True)], LIMITS)
    assert isinstance(outcome, Outcome)
    assert outcome.exit_code == 3


def test_each_probe_asks_other_questions() -> None:
    assert at_rate(make_scenario(), 1, 1).seed != at_rate(make_scenario(), 1, 2).seed


def test_verdicts_that_contradict_each_other_are_unresolved() -> None:
    outcome = searched((2, Verdict.MISSED), (1, Verdict.UNDECIDED), (2.5, Verdict.PASS))
    assert isinstance(outcome, Outcome)
    assert "2.5/s held although 2/s did not" in outcome.reason


def test_a_probe_has_the_scenarios_phases_at_its_own_rate() -> None:
    phases = [{"name": "steady", "duration_s": 5, "load": {"kind": "closed", "concurrency": 2}}]
    probe = at_rate(make_scenario(phases=phases), 7.5, 3)
    assert probe.load_of(probe.phases[0]).model_dump() == {"kind": "poisson", "rate_per_s": 7.5}
