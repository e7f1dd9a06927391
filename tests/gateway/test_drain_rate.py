import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.drain_rate import PRIOR_S, WINDOW_S, DrainRate


@given(every_s=st.floats(0.05, 2.0), expected=st.floats(0.1, 50.0))
def test_under_a_steady_backlog_the_measured_rate_outweighs_the_expected_one(every_s: float, expected: float) -> None:
    rate, now_s = DrainRate(), 0.0
    rate.note_waiting(True, now_s)
    while now_s < 2 * WINDOW_S:
        now_s += every_s
        rate.note_end(now_s)
    true = 1 / every_s
    tolerance = abs(expected - true) * PRIOR_S / (WINDOW_S + PRIOR_S) + 1 / WINDOW_S
    assert rate.per_s(now_s, expected_per_s=expected) == pytest.approx(true, abs=tolerance + 1e-6)


def test_what_ends_while_nobody_waits_says_nothing() -> None:
    rate = DrainRate()
    for second in range(100):
        rate.note_end(float(second))  # one a second was asked for, whatever could have been done
    rate.note_waiting(True, 100.0)
    assert rate.per_s(100.0, expected_per_s=7.0) == 7.0


def test_an_engine_that_stands_still_drains_more_slowly_with_every_second() -> None:
    rate = DrainRate()
    rate.note_waiting(True, 0.0)
    seen = [rate.per_s(float(second), expected_per_s=4.0) for second in range(10)]
    assert seen == sorted(seen, reverse=True)
    assert 0 < seen[-1] < 1.0


def test_a_backlog_of_long_ago_is_forgotten_and_a_recent_one_is_not() -> None:
    def after(pause_s: float) -> float:
        rate = DrainRate()
        rate.note_waiting(True, 0.0)
        for _ in range(100):
            rate.note_end(5.0)
        rate.note_waiting(False, 5.0)
        rate.note_waiting(True, 5.0 + pause_s)
        return rate.per_s(5.0 + pause_s, expected_per_s=1.0)

    assert after(WINDOW_S + 1) == 1.0
    assert after(1.0) > 10.0


@given(
    events=st.lists(st.tuples(st.sampled_from(["waits", "idle", "end"]), st.floats(0.0, 20.0)), max_size=50),
    expected=st.floats(0.01, 100.0),
)
def test_the_rate_is_never_zero_or_negative(events: list[tuple[str, float]], expected: float) -> None:
    rate, now_s = DrainRate(), 0.0
    for event, passed_s in events:
        now_s += passed_s
        if event == "end":
            rate.note_end(now_s)
        else:
            rate.note_waiting(event == "waits", now_s)
        assert rate.per_s(now_s, expected_per_s=expected) > 0
