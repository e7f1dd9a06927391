import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from loadtests.cli import app
from loadtests.compare import block_length, compare, comparison_json, p95_ratio, smallest_effect
from loadtests.errors import LoadTestError
from loadtests.record import Outcome, Record, Run, write_run
from loadtests.slo import Verdict
from loadtests.stats import Estimate
from tests.loadtests.factories import HEALTHY, make_record, make_run

COUNT = 600
SICK = replace(HEALTHY, faults=("send lag P99 9 ms",))
BASE = np.random.default_rng(1).lognormal(-2, 0.5, COUNT)


def run_of(ttft_s: Sequence[float] | NDArray[np.float64], **more: object) -> Run:
    adapters = ("legal", "support", "support")
    records = [make_record(i, ttft_s=float(value), adapter=adapters[i % 3]) for i, value in enumerate(ttft_s)]
    return make_run(records, **{"sample_floor": 300, **more})  # type: ignore[arg-type]


def changed(run: Run, change: Callable[[Record], Record]) -> Run:
    return replace(run, records=tuple(change(record) for record in run.records))


A = run_of(BASE)


def slower_by(factor: float, *, noise: float = 0.02, seed: int = 2) -> Run:
    return run_of(BASE * factor * np.random.default_rng(seed).lognormal(0, noise, COUNT))


@pytest.mark.parametrize(
    ("factor", "margin", "verdict"),
    [
        (1.0, 0.05, Verdict.PASS),
        (0.7, 0.05, Verdict.PASS),
        (1.2, 0.05, Verdict.MISSED),
        (1.2, 0.3, Verdict.PASS),
        (1.04, 0.05, Verdict.PASS),
        (1.04, 0.0, Verdict.MISSED),
    ],
)
def test_b_is_slower_when_the_whole_interval_lies_above_the_margin(
    factor: float, margin: float, verdict: Verdict
) -> None:
    comparison = compare(A, slower_by(factor), metrics=["ttft"], margin=margin)
    assert (comparison.verdict, comparison.paired) == (verdict, True)
    (row,) = comparison.rows
    assert row.ratio is not None
    assert row.ratio.low <= row.ratio.value <= row.ratio.high
    assert row.ratio.value == pytest.approx(factor, rel=0.05)
    assert row.samples == COUNT


def test_a_run_compared_with_itself_differs_by_nothing() -> None:
    assert [row.ratio for row in compare(A, A).rows] == [Estimate(1.0, 1.0, 1.0)] * 2
    assert [row.metric for row in compare(A, A).rows] == ["ttft", "e2e"]


def test_pairs_see_what_two_separate_samples_cannot() -> None:
    b = slower_by(1.1)
    separate = changed(b, lambda record: replace(record, id=f"other-{record.id}"))
    paired, unpaired = compare(A, b, metrics=["ttft"]), compare(A, separate, metrics=["ttft"])
    assert unpaired.unpaired_because == "only 0 of the requests are in both runs"
    assert (paired.verdict, unpaired.verdict) == (Verdict.MISSED, Verdict.PASS)
    assert paired.rows[0].ratio is not None
    assert unpaired.rows[0].ratio is not None
    assert paired.rows[0].ratio.value == unpaired.rows[0].ratio.value
    assert (paired.rows[0].smallest_effect or 0) < 1.1 < (unpaired.rows[0].smallest_effect or 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: replace(record, adapter="other"), "other adapters or tenants"),
        (lambda record: replace(record, intended_s=record.intended_s + 0.5), "at other instants"),
        (lambda record: replace(record, id=record.id.replace("steady", "calm")), "only 0 of the requests"),
    ],
)
def test_runs_of_different_schedules_are_not_paired_and_it_says_so(
    change: Callable[[Record], Record], said: str
) -> None:
    comparison = compare(A, changed(A, change))
    assert not comparison.paired
    assert said in comparison.unpaired_because


def test_runs_that_ask_for_other_answers_are_not_paired() -> None:
    longer = run_of(BASE, requests={"max_tokens": 999})
    assert compare(A, longer).unpaired_because == "the scenarios ask for other requests"


def test_runs_that_share_few_requests_are_not_paired() -> None:
    half = replace(A, records=tuple(replace(r, id=f"x-{r.id}") if i % 2 else r for i, r in enumerate(A.records)))
    assert compare(A, half).unpaired_because == "only 300 of the requests are in both runs"
    assert compare(A, replace(A, records=A.records[:400])).paired  # cut short, but the same schedule


def test_further_turns_of_a_conversation_may_come_at_other_instants() -> None:
    def as_second_turn(run: Run, late_s: float) -> Run:
        return changed(run, lambda record: replace(record, turn=2, intended_s=record.intended_s + late_s))

    assert compare(as_second_turn(A, 0.0), as_second_turn(A, 0.7)).paired


def test_only_requests_that_both_runs_answered_are_pairs() -> None:
    def fail_some(record: Record) -> Record:
        return replace(record, outcome=Outcome.FAILED) if int(record.id.split("-")[1]) % 10 == 0 else record

    comparison = compare(A, changed(A, fail_some))
    assert [row.samples for row in comparison.rows] == [540, 540]
    assert (comparison.verdict, comparison.fewer_answers) == (Verdict.UNDECIDED, True)
    assert compare(changed(A, fail_some), A).verdict is Verdict.PASS
    assert comparison.notes == ("B answered 90.0% of its requests, A 100.0%: only answers that came are compared",)


def test_too_few_samples_are_undecided() -> None:
    few = run_of(BASE[:299])
    comparison = compare(A, few)
    assert comparison.verdict is Verdict.UNDECIDED
    assert comparison.rows[0].note == "299 of 300 samples needed"
    assert compare(run_of([]), run_of([])).verdict is Verdict.UNDECIDED


def test_an_adapter_that_got_slower_is_found_among_the_others() -> None:
    slow = run_of([value * (1.5 if i % 3 == 0 else 1.0) for i, value in enumerate(BASE)], sample_floor=100)
    found = compare(run_of(BASE, sample_floor=100), slow, metrics=["ttft"], per_adapter=True).rows
    assert [(row.adapter, row.samples, row.verdict) for row in found[1:]] == [
        ("legal", 200, Verdict.MISSED),
        ("support", 400, Verdict.PASS),
    ]


def test_adapters_of_the_same_name_are_told_apart_by_their_tenants() -> None:
    def mine_is_acmes(record: Record) -> Record:
        return replace(record, tenant="acme" if record.adapter == "support" and int(record.id[7:]) % 3 == 2 else "zeta")

    slow = run_of([value * (1.5 if i % 3 == 2 else 1.0) for i, value in enumerate(BASE)], sample_floor=100)
    fast = run_of(BASE, sample_floor=100)
    runs = changed(fast, mine_is_acmes), changed(slow, mine_is_acmes)
    assert [
        (row.adapter, row.samples, row.verdict) for row in compare(*runs, metrics=["ttft"], per_adapter=True).rows[1:]
    ] == [
        ("acme/support", 200, Verdict.MISSED),
        ("legal", 200, Verdict.PASS),
        ("zeta/support", 200, Verdict.PASS),
    ]


@pytest.mark.parametrize(("a", "b"), [(SICK, HEALTHY), (HEALTHY, SICK)])
def test_a_void_run_is_never_a_pass_nor_a_regression(a: object, b: object) -> None:
    comparison = compare(run_of(BASE, health=a), run_of(BASE * 2, health=b))
    assert comparison.verdict is Verdict.VOID
    assert "is void: send lag P99 9 ms" in comparison.notes[0]


def test_a_p95_of_nothing_has_no_ratio() -> None:
    unloaded = changed(A, lambda record: replace(record, load_s=0.0))
    (row,) = compare(unloaded, unloaded, metrics=["load"]).rows
    assert (row.verdict, row.note) == (Verdict.UNDECIDED, "a P95 of 0 has no ratio")


@pytest.mark.parametrize("metric", ["tttf", "chunk_gap"])
def test_a_metric_without_one_value_a_request_is_refused(metric: str) -> None:
    with pytest.raises(LoadTestError, match="ttft_sent, tpot, max_gap"):
        compare(A, A, metrics=[metric])


@given(count=st.integers(1, 10**6), measured_s=st.floats(0, 1e5))
def test_blocks_leave_at_least_ten_of_them_where_there_are_as_many_requests(count: int, measured_s: float) -> None:
    block = block_length(count, measured_s)
    assert 1 <= block <= max(1, count // 10)


def test_blocks_hold_five_seconds_of_requests() -> None:
    assert block_length(2000, 200.0) == 50
    assert block_length(1000, 5000.0) == 10  # few a second: the cube root


def test_the_smallest_effect_seen_is_where_the_lower_bound_would_leave_1() -> None:
    assert smallest_effect(Estimate(1.1, 1.0, 1.2)) == pytest.approx(1.1)
    assert smallest_effect(Estimate(0.9, 0.75, 1.0)) == pytest.approx(1.2)
    assert smallest_effect(Estimate(1.0, 1.0, 1.21)) == pytest.approx(1.1)  # lopsided
    assert smallest_effect(Estimate(1.0, 1.0, 1.0)) == 1.0
    assert smallest_effect(Estimate(1.1, 1.0, 1.2), 0.5) == pytest.approx(1.65)


def test_the_interval_is_as_wide_as_the_ratio_really_varies() -> None:
    rng = np.random.default_rng(3)
    p95s = np.sort(rng.lognormal(0, 0.5, (800, 2000)), axis=1)[:, 1899]
    spread = 1.96 * float(np.log(p95s[::2] / p95s[1::2]).std())
    a, b = rng.lognormal(0, 0.5, (2, 2000))
    ratio = p95_ratio(a, b, paired=False, measured_s=400.0)
    assert ratio is not None
    assert np.log(ratio.high / ratio.low) / 2 == pytest.approx(spread, rel=0.3)


def waits_in_a_queue(arrivals_s: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Time in system of a single server that is busy 60 % of the time."""
    free_s, waits = 0.0, np.empty(len(arrivals_s))
    for i, (at_s, service_s) in enumerate(zip(arrivals_s, rng.exponential(0.06, len(arrivals_s)), strict=True)):
        free_s = max(free_s, at_s) + service_s
        waits[i] = free_s - at_s
    return waits


def test_two_equal_queues_are_hardly_ever_told_apart() -> None:
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(20):
        arrivals_s = np.cumsum(rng.exponential(0.1, 1000))
        a, b = waits_in_a_queue(arrivals_s, rng), waits_in_a_queue(arrivals_s, rng)
        ratio = p95_ratio(a, b, paired=True, measured_s=float(arrivals_s[-1]))
        alarms += ratio is not None and ratio.low > 1
    assert alarms <= 3  # drawn one by one, 5 of these 20 would be


def test_the_same_runs_give_the_same_comparison() -> None:
    assert comparison_json(compare(A, slower_by(1.1))) == comparison_json(compare(A, slower_by(1.1)))


def invoke(folder: Path, a: Run, b: Run, *arguments: str) -> Result:
    for name, run in (("a", a), ("b", b)):
        (folder / name).mkdir(exist_ok=True)
        write_run(folder / name / "records.jsonl", run)
    return CliRunner().invoke(app, ["compare", str(folder / "a"), str(folder / "b"), *arguments])


@pytest.mark.parametrize(
    ("b", "exit_code", "said"),
    [
        (slower_by(1.0), 0, "PASS"),
        (slower_by(1.5), 1, "MISSED"),
        (run_of(BASE[:50]), 3, "50 of 300 samples needed"),
        (run_of(BASE, health=SICK), 4, "VOID"),
        (changed(slower_by(0.5), lambda record: replace(record, wrong="legal")), 1, "B has wrong answers."),
        (
            changed(slower_by(0.5), lambda r: replace(r, outcome=Outcome.FAILED) if r.id.endswith("0") else r),
            3,
            "B answered fewer requests.",
        ),
    ],
)
def test_the_command_exits_with_the_verdict(b: Run, exit_code: int, said: str, tmp_path: Path) -> None:
    result = invoke(tmp_path, A, b)
    assert result.exit_code == exit_code, result.output
    assert said in result.output


def test_the_command_prints_one_json_document(tmp_path: Path) -> None:
    result = invoke(tmp_path, A, slower_by(1.5), "--json", "--metric", "ttft", "--margin", "0.2", "--per-adapter")
    document = json.loads(result.stdout)
    assert (document["verdict"], document["exit_code"], document["margin"]) == ("missed", 1, 0.2)
    assert [row["adapter"] for row in document["rows"]] == [None, "legal", "support"]
    assert document["rows"][0]["ratio"]["low"] > 1.2
    assert document["rows"][0]["smallest_effect"] > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--margin", "five"], "5% or 0.05"), (["--margin", "5"], "write 5%"), (["--metric", "speed"], "metric 'speed'")],
)
def test_wrong_usage_has_its_own_exit_code(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = invoke(tmp_path, A, A, *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_folder_without_a_run_is_wrong_usage(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path)]).exit_code == 2


def test_the_help_names_the_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output.split())
    for code in ("0 B is not shown", "1 it is", "2 usage", "3 undecided", "4 one of the runs is void"):
        assert code in text
