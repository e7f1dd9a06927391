from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.groups import Columns, Group, groups, is_good, jain
from loadtests.record import Outcome, PhaseWindow, Record
from tests.loadtests.factories import WINDOWS, make_record


def group_of(records: list[Record], kind: str, name: str, **more: Any) -> Group:
    return next(
        one for one in groups(Columns(records, **more), WINDOWS, seed=0) if (one.kind, one.name) == (kind, name)
    )


def test_only_whole_answers_of_measured_phases_count() -> None:
    records: list[Record] = [
        make_record(1, ttft_s=0.1),
        make_record(2, ttft_s=9.0, phase="warm-up"),
        make_record(3, outcome=Outcome.FAILED),
        make_record(4, outcome=Outcome.REFUSED),
        make_record(5, outcome=Outcome.CENSORED),
        make_record(6, outcome=Outcome.CANCELLED),
    ]
    overall = groups(Columns(records), WINDOWS, seed=0)[0]
    assert overall.metrics["ttft"].max == pytest.approx(0.1)
    assert overall.count == 5
    assert overall.success_rate == 1 / 4  # what we gave up ourselves is nobody's failure
    assert overall.is_lower_bound
    assert overall.refusal is not None


def test_groups_are_overall_then_adapters_by_traffic_then_all_others() -> None:
    records = [
        make_record(
            i, adapter="legal" if i < 3 else "support", tenant="acme", load_s=0.5 if i < 2 else 0.0, visit=visit
        )
        for i, visit in enumerate(["first", "again", "again", "after_eviction", "", "", ""])
    ]
    assert [(group.kind, group.name, group.count) for group in groups(Columns(records), WINDOWS, seed=0)] == [
        ("overall", "all", 7),
        ("adapter", "support", 4),
        ("adapter", "legal", 3),
        ("tenant", "acme", 7),
        ("phase", "steady", 7),
        ("temperature", "warm", 5),
        ("temperature", "cold", 2),
        ("visit", "first", 1),
        ("visit", "again", 2),
        ("visit", "after_eviction", 1),
    ]
    assert group_of(records, "overall", "all").output_tokens_per_s == 2.1


def test_a_server_that_reports_no_load_time_has_neither_warm_nor_cold_requests() -> None:
    assert {one.kind for one in groups(Columns([make_record(1)]), WINDOWS, seed=0)} == {
        "overall",
        "adapter",
        "tenant",
        "phase",
    }


def test_rates_of_a_phase_count_over_its_own_time() -> None:
    windows = (PhaseWindow("short", True, 0.0, 1.0), PhaseWindow("long", True, 1.0, 10.0))
    records = [make_record(1, phase="short", end_s=0.9)] + [make_record(i, phase="long") for i in range(2, 11)]
    found = {
        one.name: one.per_s for one in groups(Columns(records), windows, seed=0) if one.kind in ("overall", "phase")
    }
    assert found == {"all": 1.0, "short": 1.0, "long": 1.0}


def test_what_was_answered_after_the_measured_time_is_no_rate_of_it() -> None:
    windows = (PhaseWindow("first", True, 0.0, 10.0), PhaseWindow("last", True, 10.0, 20.0))
    ends = [("first", 9.0), ("first", 12.0), ("last", 19.0), ("last", 25.0), ("last", 30.0)]
    records = [make_record(i, phase=phase, end_s=end_s) for i, (phase, end_s) in enumerate(ends)]
    found = {one.name: one for one in groups(Columns(records), windows, seed=0)}
    assert {name: found[name].per_s for name in ("all", "support", "first", "last")} == {
        "all": 3 / 20,
        "support": 3 / 20,
        "first": 1 / 10,
        "last": 1 / 10,
    }
    assert (found["all"].good_per_s, found["all"].output_tokens_per_s) == (3 / 20, 9 / 20)
    assert (found["all"].good, found["all"].goodput) == (5, 1.0)


@pytest.mark.parametrize(
    ("record", "good"),
    [
        (make_record(1, ttft_s=0.3), True),
        (make_record(1, ttft_s=0.5), False),
        (make_record(1, ttft_s=0.3, wrong="answered by legal@1"), False),
        (make_record(1, outcome=Outcome.FAILED), False),
        (make_record(1, stream=False), True),  # has no ttft; its end to end time is within the other limit
        (make_record(1, ttft_s=0.3, content_s=[1.2, 3.5]), False),
    ],
)
def test_an_answer_is_good_when_it_is_whole_right_and_within_every_limit_it_has_a_figure_for(
    record: Record, good: bool
) -> None:
    assert is_good(record, {"ttft": 0.4, "e2e": 2.0}) is good


def test_goodput_is_the_share_and_the_rate_of_good_answers() -> None:
    records = [make_record(i, ttft_s=0.1 if i < 5 else 0.9) for i in range(8)]
    records += [make_record(8, outcome=Outcome.REFUSED), make_record(9, outcome=Outcome.CANCELLED)]
    overall = group_of(records, "overall", "all", limits={"steady": {"ttft": 0.4}})
    assert (overall.good, overall.goodput, overall.good_per_s) == (5, 5 / 9, 0.5)
    assert group_of(records, "overall", "all").goodput == 8 / 9  # without limits every answer is good


@given(shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=20), factor=st.floats(0.1, 10))
def test_jains_index_is_between_1_over_n_and_1_and_has_no_unit(shares: list[float], factor: float) -> None:
    index = jain(shares)
    assert index is not None
    assert 1 / len(shares) <= index * (1 + 1e-9)
    assert index <= 1 + 1e-9
    assert jain([share * factor for share in shares]) == pytest.approx(index)
    assert jain([shares[0]] * len(shares)) == pytest.approx(1)


@given(given_to=st.integers(1, 10), of=st.integers(2, 20))
def test_jains_index_is_the_share_of_those_who_get_something_when_they_get_the_same(given_to: int, of: int) -> None:
    given_to = min(given_to, of)
    assert jain([0.7] * given_to + [0.0] * (of - given_to)) == pytest.approx(given_to / of)


def test_fairness_weighs_what_each_got_against_what_it_asked_for() -> None:
    busy = [make_record(i, tenant="busy") for i in range(30)]
    quiet = [make_record(30 + i, tenant="quiet") for i in range(3)]
    assert group_of(busy + quiet, "overall", "all").fairness["tenant"].index == pytest.approx(1)
    refused = [make_record(40 + i, tenant="quiet", outcome=Outcome.REFUSED) for i in range(3)]
    given_up = [make_record(50 + i, tenant="quiet", outcome=Outcome.CANCELLED) for i in range(9)]
    fairness = group_of(busy + quiet + refused + given_up, "phase", "steady").fairness["tenant"]
    assert fairness.index == pytest.approx((1 + 0.5) ** 2 / (2 * (1 + 0.25)))
    assert (fairness.parties, fairness.fewest) == (2, 6)


@pytest.mark.parametrize("tenants", [["one"], ["one", "two"]])
def test_there_is_no_fairness_where_there_is_nothing_to_compare(tenants: list[str]) -> None:
    outcome = Outcome.OK if len(tenants) == 1 else Outcome.FAILED
    records = [make_record(i, tenant=tenant, outcome=outcome) for i, tenant in enumerate(tenants)]
    assert "tenant" not in group_of(records, "overall", "all").fairness


def test_adapters_of_several_tenants_that_share_a_name_are_told_apart() -> None:
    asked = [("acme", "support"), ("zeta", "support"), ("acme", "legal"), ("acme", "lib/all"), ("zeta", "lib/all")]
    records = [
        make_record(i, tenant=asked[i % 5][0], adapter=asked[i % 5][1], ttft_s=9.0 if i % 5 == 1 else 0.1)
        for i in range(20)
    ]
    found = {one.name: one for one in groups(Columns(records, {"steady": {"ttft": 1.0}}), WINDOWS, seed=0)}
    assert {name: one.goodput for name, one in found.items() if one.kind == "adapter"} == {
        "acme/support": 1.0,
        "zeta/support": 0.0,
        "legal": 1.0,
        "lib/all": 1.0,
    }
    assert found["all"].fairness["adapter"].parties == 4
