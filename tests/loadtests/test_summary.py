import json
from dataclasses import replace
from typing import Any

import pytest

from loadtests.compare import compare
from loadtests.errors import RecordError
from loadtests.record import Outcome, PhaseWindow, Run
from loadtests.slo import Verdict
from loadtests.summary import format_s, summarise, summary_json
from tests.loadtests.factories import HEALTHY, make_record, make_run

GOOD = [make_record(i, ttft_s=0.1) for i in range(50)]
SLOW = [make_record(i, ttft_s=3.0) for i in range(50)]
P95 = ["p95(ttft) < 1 s"]
SICK = replace(HEALTHY, faults=("send lag",))


@pytest.mark.parametrize(
    ("run", "verdict", "exit_code"),
    [
        (make_run(GOOD, objectives=P95), Verdict.PASS, 0),
        (make_run(SLOW, objectives=P95), Verdict.MISSED, 1),
        (make_run(GOOD[:5], objectives=P95), Verdict.UNDECIDED, 3),
        (make_run([], objectives=P95), Verdict.UNDECIDED, 3),
        (replace(make_run([], interrupted=True), windows=()), Verdict.UNDECIDED, 3),
        (make_run(GOOD, objectives=P95, interrupted=True), Verdict.UNDECIDED, 3),
        (make_run(SLOW, objectives=P95, interrupted=True), Verdict.MISSED, 1),
        (make_run(GOOD, objectives=P95, health=SICK), Verdict.VOID, 4),
        (make_run(SLOW, objectives=P95, health=SICK), Verdict.VOID, 4),
        (
            make_run([*GOOD, *(make_record(i, outcome=Outcome.FAILED) for i in range(9))], objectives=P95),
            Verdict.MISSED,
            1,
        ),
    ],
)
def test_the_verdict_gives_the_exit_code(run: Run, verdict: Verdict, exit_code: int) -> None:
    summary = summarise(run)
    assert (summary.verdict, summary.exit_code) == (verdict, exit_code)
    assert bool(summary.reasons) == (verdict is not Verdict.PASS)
    document = json.loads(json.dumps(summary_json(run, summary)))
    assert (document["verdict"], document["exit_code"]) == (verdict.value, exit_code)


WRONG = [*GOOD, make_record(50, wrong="answered by legal@1")]


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (make_run(WRONG, objectives=P95), Verdict.MISSED),
        (make_run([*SLOW, *WRONG], objectives=P95), Verdict.MISSED),
        (make_run([*GOOD, make_record(50, phase="warm-up", wrong="legal")], objectives=P95), Verdict.MISSED),
        (make_run(WRONG, objectives=P95, interrupted=True), Verdict.MISSED),
        (make_run(WRONG, objectives=P95, health=SICK), Verdict.MISSED),
    ],
)
def test_one_wrong_answer_fails_the_run_however_it_was_measured_and_is_told_first(run: Run, verdict: Verdict) -> None:
    summary = summarise(run)
    assert summary.verdict is verdict
    assert "1 of the answers belonged to somebody else" in summary.reasons[0]
    wrong = summary_json(run, summary)["wrong"]
    assert (wrong["count"], wrong["first"][0]["id"]) == (1, "steady-50")


def test_an_objective_in_a_phase_sees_that_phase_only() -> None:
    phases = [{"name": name, "duration_s": 5} for name in ("cold-1", "cold-2", "steady")]
    windows = tuple(PhaseWindow(str(phase["name"]), True, i * 5.0, i * 5.0 + 5) for i, phase in enumerate(phases))
    records = [
        make_record(i, phase=str(phases[i % 3]["name"]), ttft_s=(2.0, 4.0, 0.1)[i % 3], adapter="ab"[i % 2])
        for i in range(90)
    ]

    def verdicts(objective: str) -> list[tuple[str, Verdict]]:
        planned = [*phases, {"name": "never-reached", "duration_s": 5}]
        run = replace(make_run(records, phases=planned, objectives=[objective]), windows=windows)
        return [
            (judgement.group.name, judgement.verdict)
            for judgement in summarise(run).judgements
            if judgement.objective.metric
        ]

    assert verdicts("p95(ttft) < 1 s") == [("all", Verdict.MISSED)]
    assert verdicts("p95(ttft) < 1 s in steady") == [("all", Verdict.PASS)]
    assert verdicts("p95(ttft) < 3 s in cold-*") == [("all", Verdict.MISSED)]
    assert verdicts("p95(ttft) < 3 s per phase in cold-*") == [("cold-1", Verdict.PASS), ("cold-2", Verdict.MISSED)]
    assert verdicts("p95(ttft) < 1 s per adapter in steady") == [("a", Verdict.PASS), ("b", Verdict.PASS)]
    assert verdicts("p95(ttft) < 1 s per adapter in never-reached") == [("all", Verdict.UNDECIDED)]


def test_a_thousand_good_requests_cost_what_the_servers_cost_while_making_them() -> None:
    records = [make_record(i, ttft_s=0.1 if i % 2 else 3.0) for i in range(100)]
    run = make_run(records, objectives=["p95(ttft) < 1 s"], price_per_hour=3.6)
    costs = {group["kind"]: group["cost_per_thousand_good"] for group in summary_json(run, summarise(run))["groups"]}
    # 50 good ones in 10 s, at 0.001 a second
    assert costs == {"overall": pytest.approx(0.2), "phase": pytest.approx(0.2), "adapter": None, "tenant": None}


def test_an_audit_that_found_a_leak_misses() -> None:
    fields: dict[str, Any] = {
        "phases": [{"name": "steady", "duration_s": 1, "audit": True}],
        "limits": {"default": {"requests_per_minute": 60, "burst": 5}},
    }
    run = make_run(GOOD, **fields)
    summary = summarise(run)
    assert summary.verdict is Verdict.MISSED
    assert "let through above 60 a minute" in summary.reasons[0]
    assert summary_json(run, summary)["audit"]["tenants"][0]["offered"] == 50


def test_the_same_records_give_the_same_summary() -> None:
    run = make_run(GOOD, objectives=P95)
    assert summary_json(run, summarise(run)) == summary_json(run, summarise(run))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0000421, "42 µs"), (0.00123, "1.23 ms"), (0.4, "400 ms"), (0.9996, "1 s"), (1.234, "1.23 s"), (1234, "1234 s")],
)
def test_times_are_shown_in_a_fitting_unit(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


def test_a_kept_scenario_that_is_not_understood_is_a_fault_of_the_records() -> None:
    run = make_run(GOOD)
    later = replace(run, scenario={**run.scenario, "sample_floor": 0, "of_a_later_version": 1})
    for read in (summarise, lambda run: compare(run, run)):
        with pytest.raises(RecordError, match=r"2026-01-01.*sample_floor.*of_a_later_version"):
            read(later)


def test_the_worst_miss_is_told_first() -> None:
    records = [make_record(i, adapter="poor", ttft_s=2.0) for i in range(20)]
    records += [make_record(i, adapter="worst", ttft_s=9.0) for i in range(20)]
    assert "worst" in summarise(make_run(records, objectives=["p95(ttft) < 1 s per adapter"])).reasons[0]
