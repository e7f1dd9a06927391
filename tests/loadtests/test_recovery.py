from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.record import Mark, Outcome, PhaseWindow, Record
from loadtests.recovery import STEADY, Recovery, recoveries
from loadtests.summary import summarise, summary_json
from tests.loadtests.factories import make_record, make_run

WINDOWS = (PhaseWindow("steady", True, 0.0, 100.0), PhaseWindow("chaos", True, 100.0, 200.0))


def ask(at_s: float, *, took_s: float | None = 0.5, outcome: Outcome = Outcome.OK, **fields: Any) -> Record:
    end_s = None if took_s is None else at_s + took_s
    return make_record(0, intended_s=at_s, end_s=end_s, outcome=outcome, **fields)


def failing(*at_s: float, outcome: Outcome = Outcome.FAILED) -> list[Record]:
    """A request a second from 90 to 150; those at the given instants do not end well."""
    return [ask(float(i), outcome=outcome if i in at_s else Outcome.OK) for i in range(90, 150)]


def recovery(records: Sequence[Record], *marks: Mark) -> Recovery:
    return recoveries(marks or (KILL,), WINDOWS, records)[0]


KILL = Mark("kill", 110.2, 110.4)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.REFUSED, Outcome.CENSORED])
def test_recovery_lasts_from_the_event_to_the_first_of_five_ok_requests_after_the_last_failure(
    outcome: Outcome,
) -> None:
    found = recovery(failing(111, 112, 119, outcome=outcome))
    assert (found.mark, found.phase, found.failed) == (KILL, "chaos", 3)
    assert found.after_s == pytest.approx(120 - 110.2)


def test_nothing_failed_then_there_is_nothing_to_recover_from() -> None:
    assert recovery(failing()) == Recovery(KILL, "chaos", 0, None)


def test_what_failed_before_the_event_is_not_put_down_to_it() -> None:
    assert recovery(failing(95, 109)).failed == 0


def test_a_request_in_flight_when_the_event_began_is_put_down_to_it() -> None:
    found = recovery([*failing(), ask(109.0, took_s=3.0, outcome=Outcome.FAILED)])
    assert found.failed == 1
    assert found.after_s == pytest.approx(111 - 110.2)  # not that of requests sent before the event


def test_the_latest_event_that_had_begun_is_the_one_to_blame() -> None:
    marks = (Mark("unload", 130.0, 130.1), KILL)  # in any order
    kill, unload = recoveries(marks, WINDOWS, failing(112, 131, 132))
    assert (kill.mark.name, kill.failed, unload.failed) == ("kill", 1, 2)
    assert unload.after_s == pytest.approx(3.0)


def test_an_event_is_not_blamed_for_what_fails_in_later_phases() -> None:
    upload = Mark("upload", 98.0, 99.0)
    assert recovery(failing(99, 120), upload).failed == 1


def test_fewer_than_five_ok_requests_to_the_end_are_no_recovery() -> None:
    assert recovery(failing(145)).after_s is None
    assert recovery(failing(144)).after_s == pytest.approx(145 - 110.2)


def test_a_wrong_answer_is_a_failure_and_a_cancelled_request_neither() -> None:
    records = failing(113, outcome=Outcome.CANCELLED)
    records[112 - 90].wrong = "answered by another"
    found = recovery(records)
    assert found.failed == 1
    assert found.after_s == pytest.approx(114 - 110.2)


def test_the_summary_tells_each_event_with_its_recovery() -> None:
    run = replace(make_run(failing(112)), windows=WINDOWS, events=(KILL,))
    (told,) = summary_json(run, summarise(run))["events"]
    assert (told["name"], told["phase"], told["failed"]) == ("kill", "chaos", 1)
    assert told["ok_again_after_s"] == pytest.approx(113 - 110.2)


@given(st.lists(st.booleans(), max_size=60), st.floats(0, 60))
def test_after_its_recovery_nothing_fails_that_the_event_is_to_blame_for(ok: list[bool], at_s: float) -> None:
    records = [ask(float(i), outcome=Outcome.OK if good else Outcome.FAILED) for i, good in enumerate(ok)]
    found = recovery(records, Mark("kill", at_s, at_s))
    blamed = [i for i, good in enumerate(ok) if not good and i + 0.5 >= at_s]
    assert found.failed == len(blamed)
    if found.after_s is None:
        assert not blamed or len(ok) - 1 - blamed[-1] < STEADY + 1
    else:
        again = round(at_s + found.after_s)
        assert again > blamed[-1]
        assert all(ok[again : again + STEADY])
