import json
from dataclasses import replace

import pytest

from loadtests.record import Outcome, Run
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


def test_the_same_records_give_the_same_summary() -> None:
    run = make_run(GOOD, objectives=P95)
    assert summary_json(run, summarise(run)) == summary_json(run, summarise(run))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0000421, "42 µs"), (0.00123, "1.23 ms"), (0.4, "400 ms"), (0.9996, "1 s"), (1.234, "1.23 s"), (1234, "1234 s")],
)
def test_times_are_shown_in_a_fitting_unit(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


def test_the_worst_miss_is_told_first() -> None:
    records = [make_record(i, adapter="poor", ttft_s=2.0) for i in range(20)]
    records += [make_record(i, adapter="worst", ttft_s=9.0) for i in range(20)]
    assert "worst" in summarise(make_run(records, objectives=["p95(ttft) < 1 s per adapter"])).reasons[0]
