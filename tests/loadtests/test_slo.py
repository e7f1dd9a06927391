from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.errors import ObjectiveError
from loadtests.groups import Columns, groups
from loadtests.record import METRICS, Outcome
from loadtests.slo import (
    SCOPES,
    UNITS_S,
    Judgement,
    Verdict,
    goodput_limits,
    judge,
    parse_objective,
    parse_objectives,
    parse_time_s,
    percentiles_for,
)
from tests.loadtests.factories import WINDOWS, make_record


def judged(text: str, records: list[object], floor: int = 5) -> list[Judgement]:
    objective = parse_objective(text)
    found = groups(Columns(records), WINDOWS, seed=0, percentiles=percentiles_for([objective]))  # type: ignore[arg-type]
    return judge(objective, found, sample_floor=floor)


@given(
    percent=st.sampled_from(["50", "95", "99.9"]),
    metric=st.sampled_from(sorted(METRICS)),
    comparison=st.sampled_from(["<", "<=", ">", ">="]),
    number=st.decimals(0, 1000, places=2),
    unit=st.sampled_from(sorted(UNITS_S)),
    scope=st.sampled_from(["", *SCOPES]),
    space=st.sampled_from(["", " ", "  "]),
    phases=st.sampled_from(["", "steady", "churn-*", "per-2", "s[t]eady"]),
)
def test_every_objective_of_the_grammar_is_read(
    percent: str, metric: str, comparison: str, number: object, unit: str, scope: str, space: str, phases: str
) -> None:
    per = (f" per {scope}" if scope else "") + (f" in {phases}" if phases else "")
    objective = parse_objective(f"p{percent}({metric}){space}{comparison}{space}{number}{space}{unit}{per}")
    assert objective.percent == float(percent)
    assert (objective.metric, objective.comparison, objective.scope) == (metric, comparison, scope or "overall")
    assert objective.phases == (phases or "*")
    assert objective.limit == pytest.approx(float(str(number)) * UNITS_S[unit])


@given(st.text(alphabet="p95(t)<40 msemax_rate%>.=", max_size=30))
def test_any_other_text_is_refused_with_the_packages_error(text: str) -> None:
    with suppress(ObjectiveError):
        assert parse_objective(text).text == text.strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p95(tttf) < 4 ms", "no metric 'tttf'"),
        ("p95(ttft) < 400", "needs its unit"),
        ("p95(ttft) < 4 %", "needs its unit"),
        ("p0(ttft) < 4 ms", "percentile"),
        ("p101(ttft) < 4 ms", "percentile"),
        ("p95(ttft) < 4 ms per request", "per adapter, per tenant and per phase"),
        ("success_rate > 99", "between 0 and 1"),
        ("success_rate > 1 s", "between 0 and 1"),
        ("fast please", "write one like"),
        ("goodput > 95", "between 0 and 1"),
        ("fairness > 2", "between 0 and 1"),
        ("fairness > 0.9 per tenant", "no value of one tenant"),
        ("fairness(users) > 0.9", "write one like"),
        ("goodput(tenants) > 0.9", "only fairness"),
        ("good_per_s > 3 %", "plain number"),
        ("p95(ttft) < 4 ms in", "write one like"),
        ("p95(ttft) < 4 ms in steady per adapter", "write one like"),
    ],
)
def test_a_refusal_says_what_is_not_understood(text: str, said: str) -> None:
    with pytest.raises(ObjectiveError, match=said):
        parse_objective(text)


def test_a_rate_may_be_a_share_or_a_percentage() -> None:
    assert parse_objective("success_rate > 99 %").limit == parse_objective("success_rate > 0.99").limit


def test_success_is_always_an_objective() -> None:
    assert [o.figure for o in parse_objectives(["p95(ttft) < 1 s"])] == ["percentile", "success_rate"]
    assert len(parse_objectives(["success_rate > 0.5"])) == 1


@pytest.mark.parametrize(
    ("written", "added"),
    [
        ([], [""]),
        (["p95(ttft) < 1 s", "p95(e2e) < 1 s"], [""]),
        (["p95(ttft) < 1 s per adapter", "p95(e2e) < 1 s per adapter"], ["", " per adapter"]),
        (["p95(ttft) < 1 s in steady"], ["", " in steady"]),
        (["p95(ttft) < 1 s in churn", "success_rate > 0.9 in steady"], [" in churn"]),
        (["p95(ttft) < 1 s per adapter in churn", "success_rate > 0.9 in steady"], [" per adapter in churn"]),
        (["p95(ttft) < 1 s", "success_rate > 0.9 in steady"], [""]),
        (["p95(ttft) < 1 s in s[t]eady", "success_rate > 0.9 in s[t]eady"], []),
        (["p95(ttft) < 1 s in churn-*", "p95(ttft) < 1 s in churn-up", "success_rate > 0.9 in churn-*"], []),
        (["p95(ttft) < 1 s per adapter in churn", "success_rate > 0.9"], []),
        (["p95(ttft) > 1 s", "answers_per_s > 1 in churn", "success_rate > 0.9 in steady"], []),
    ],
)
def test_success_is_an_objective_wherever_a_latency_is(written: list[str], added: list[str]) -> None:
    texts = [objective.text for objective in parse_objectives(written)]
    assert texts == [*written, *(f"success_rate > 99 %{where}" for where in added)]


def test_an_objective_per_adapter_finds_the_one_that_starves() -> None:
    records = [make_record(i, ttft_s=0.1) for i in range(200)]
    records += [make_record(i, ttft_s=3.0, adapter="legal") for i in range(6)]
    assert [j.verdict for j in judged("p95(ttft) < 400 ms", [*records])] == [Verdict.PASS]
    found = {j.group.name: j.verdict for j in judged("p95(ttft) < 400 ms per adapter", [*records])}
    assert found == {"support": Verdict.PASS, "legal": Verdict.MISSED}


def test_a_group_below_the_sample_floor_is_undecided_whatever_it_shows() -> None:
    records = [make_record(i, ttft_s=9.0 if i % 2 else 0.1) for i in range(4)]
    for text in ("p95(ttft) < 400 ms", "p10(ttft) < 400 ms", "success_rate > 0.5"):
        assert [j.verdict for j in judged(text, [*records])] == [Verdict.UNDECIDED]


def test_a_percentile_that_is_only_a_lower_bound_can_miss_but_not_pass() -> None:
    records = [make_record(i) for i in range(20)] + [make_record(99, outcome=Outcome.CENSORED) for _ in range(4)]
    assert [j.verdict for j in judged("p95(ttft) < 400 ms", [*records])] == [Verdict.UNDECIDED]
    assert [j.verdict for j in judged("p95(ttft) < 50 ms", [*records])] == [Verdict.MISSED]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("p95(ttft) < 400 ms", Verdict.PASS),  # of 100, the 95th is known
        ("p96(ttft) < 400 ms", Verdict.PASS),
        ("p97(ttft) < 400 ms", Verdict.UNDECIDED),
        ("p96(ttft) < 194.5 ms", Verdict.MISSED),  # the 96th of 96 + 4, not the 93rd of 96
        ("p99(ttft) > 400 ms", Verdict.UNDECIDED),
        ("p99(ttft) > 100 ms", Verdict.PASS),
        ("max(ttft) < 400 ms", Verdict.UNDECIDED),
        ("mean(ttft) < 400 ms", Verdict.UNDECIDED),
        ("max(ttft) < 190 ms", Verdict.MISSED),
    ],
)
def test_what_was_cut_off_ranks_above_every_answer(text: str, verdict: Verdict) -> None:
    records = [make_record(i, ttft_s=0.1 + i / 1000) for i in range(96)]
    records += [make_record(i, outcome=Outcome.CENSORED) for i in range(96, 100)]
    (found,) = judged(text, [*records])
    assert found.verdict is verdict
    assert (found.note == "at least this: 4 were cut off by the end") == (verdict is Verdict.UNDECIDED)


def test_nothing_measured_is_undecided() -> None:
    assert [j.verdict for j in judged("p95(load) < 400 ms", [make_record(i) for i in range(9)])] == [Verdict.UNDECIDED]


def test_unusual_percentiles_means_and_maxima_are_judged() -> None:
    records = [make_record(i, ttft_s=0.1 + i / 1000) for i in range(100)]
    for text in ("p99.9(ttft) < 200 ms", "p12.5(ttft) > 110 ms", "mean(ttft) < 150 ms", "max(ttft) >= 190 ms"):
        assert [j.verdict for j in judged(text, [*records])] == [Verdict.PASS]
    assert [j.verdict for j in judged("answers_per_s >= 10", [*records])] == [Verdict.PASS]


def test_a_figure_of_its_own_is_read_with_what_belongs_to_it() -> None:
    assert parse_objective("goodput > 95 % per adapter in steady").limit == 0.95
    assert parse_objective("fairness > 0.9").between == "tenant"
    assert parse_objective("fairness ( adapters ) > 0.9 per phase").between == "adapter"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("goodput > 0.45", Verdict.PASS),
        ("goodput > 55 %", Verdict.MISSED),
        ("good_per_s >= 1", Verdict.PASS),
        ("good_per_s > 1", Verdict.MISSED),
        ("fairness > 0.99", Verdict.PASS),
        ("fairness(adapters) > 0.49", Verdict.PASS),
        ("fairness(adapters) > 0.51", Verdict.MISSED),
        ("fairness(adapters) > 0.51 per phase", Verdict.MISSED),
    ],
)
def test_goodput_and_fairness_are_judged(text: str, verdict: Verdict) -> None:
    records = [
        make_record(i, ttft_s=9.0 if i % 2 else 0.1, adapter="ab"[i % 2], tenant=f"t{i % 4 // 2}") for i in range(20)
    ]
    found = groups(Columns(records, {"steady": {"ttft": 0.4}}), WINDOWS, seed=0)
    assert [j.verdict for j in judge(parse_objective(text), found, sample_floor=5)] == [verdict]
    assert {j.verdict for j in judge(parse_objective(text), found, sample_floor=21)} == {Verdict.UNDECIDED}


def test_fairness_rests_on_the_one_that_asked_least() -> None:
    records = [make_record(i, tenant="few" if i < 4 else "many") for i in range(100)]
    assert [j.verdict for j in judged("fairness > 0.5", [*records])] == [Verdict.UNDECIDED]


def test_an_objective_without_any_group_is_undecided() -> None:
    assert [j.verdict for j in judged("p95(ttft) < 1 s per adapter", [])] == [Verdict.UNDECIDED]
    assert [j.verdict for j in judged("fairness > 0.5", [make_record(i) for i in range(9)])] == [Verdict.UNDECIDED]


def test_a_good_answer_keeps_the_widest_latency_limit_of_its_phase() -> None:
    objectives = parse_objectives(
        ["p50(ttft) < 100 ms", "p95(ttft) < 400 ms", "max(ttft) < 3 s in cold*", "p95(queue) < 1 ms", "mean(e2e) > 1 s"]
    )
    assert goodput_limits({}, objectives, ["steady", "cold-2"]) == {"steady": {"ttft": 0.4}, "cold-2": {"ttft": 3.0}}
    loose = parse_objectives(["p50(ttft) < 1 s", "mean(e2e) < 1 s", "max(chunk_gap) < 1 s", "p94.9(tpot) < 1 s"])
    assert goodput_limits({}, loose, ["steady"]) == {"steady": {}}
    assert goodput_limits({"e2e": "2 s"}, objectives, ["steady"]) == {"steady": {"e2e": 2.0}}


@pytest.mark.parametrize("text", ["400", "2 h", "-1 s", "400 ms per adapter"])
def test_a_time_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(ObjectiveError, match="400 ms or 2 s"):
        parse_time_s(text)
