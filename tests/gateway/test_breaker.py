import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.breaker import Attempt, Breaker
from gateway.errors import NoReplicaError


def breaker(*, failures: int = 3, open_s: float = 5.0) -> Breaker:
    return Breaker(failures=failures, open_s=open_s)


def fail(one: Breaker, now_s: float) -> None:
    attempt = one.begin(now_s)
    one.failed(attempt, now_s)
    one.end(attempt)


def opened(now_s: float = 0.0) -> Breaker:
    one = breaker()
    for _ in range(3):
        fail(one, now_s)
    return one


def test_failures_in_a_row_open_it_and_others_do_not() -> None:
    one = breaker()
    fail(one, 0.0)
    fail(one, 0.0)
    one.succeeded(0.1)
    fail(one, 0.2)
    fail(one, 0.2)
    assert one.state(0.2) == "closed"
    fail(one, 0.3)
    assert one.state(0.3) == "open"
    with pytest.raises(NoReplicaError):
        one.begin(0.4)


def test_one_trial_at_a_time_and_an_answer_closes_it() -> None:
    one = opened()
    assert one.state(5.0) == "half-open"
    trial = one.begin(5.0)
    assert not one.admits(5.0)
    one.succeeded(5.1)
    one.end(trial)
    assert one.state(5.1) == "closed"
    assert one.admits(5.1)


def test_a_trial_that_fails_opens_it_for_as_long_again() -> None:
    one = opened()
    fail(one, 6.0)
    assert one.state(10.9) == "open"
    assert one.state(11.0) == "half-open"


def test_a_trial_whose_caller_left_frees_its_place() -> None:
    one = opened()
    one.end(one.begin(5.0))
    assert one.state(5.0) == "half-open"
    assert one.begin(5.0).trial


def test_failures_of_requests_from_before_do_not_keep_it_open_for_longer() -> None:
    one = opened()
    one.failed(Attempt(trial=False), 4.9)
    assert one.state(5.0) == "half-open"


def test_a_new_process_starts_with_a_clean_record() -> None:
    one = opened()
    one.renew(1.0)
    assert one.state(1.0) == "closed"
    assert (one.answered_s, one.well_since_s) == (1.0, 1.0)
    one.succeeded(2.0)
    assert (one.answered_s, one.well_since_s) == (2.0, 1.0)


EVENTS = st.lists(st.tuples(st.sampled_from(["begin", "ok", "fail", "leave"]), st.floats(0.0, 4.0)), max_size=60)


@given(events=EVENTS)
def test_whatever_happens_it_lets_requests_through_again(events: list[tuple[str, float]]) -> None:
    one, now_s, attempts = breaker(), 0.0, list[Attempt]()
    for event, passed_s in events:
        now_s += passed_s
        if event == "begin" and one.admits(now_s):
            attempts.append(one.begin(now_s))
            assert sum(attempt.trial for attempt in attempts) <= 1
        elif event != "begin" and attempts:
            attempt = attempts.pop()
            if event == "ok":
                one.succeeded(now_s)
            elif event == "fail":
                one.failed(attempt, now_s)
            one.end(attempt)
    for attempt in attempts:
        one.end(attempt)
    assert one.admits(now_s + 5.0)
