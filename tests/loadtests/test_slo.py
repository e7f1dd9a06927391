from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.errors import ObjectiveError
from loadtests.record import METRICS, Outcome
from loadtests.slo import SCOPES, UNITS_S, Judgement, Verdict, judge, parse_objective, parse_objectives, percentiles_for
from loadtests.stats import groups
from tests.loadtests.factories import WINDOWS, make_record


def judged(text: str, records: list[object], floor: int = 5) -> list[Judgement]:
    objective = parse_objective(text)
    found = groups(records, WINDOWS, seed=0, percentiles=percentiles_for([objective]))  # type: ignore[arg-type]
    return judge(objective, found, sample_floor=floor)


@given(
    percent=st.sampled_from(["50", "95", "99.9"]),
    metric=st.sampled_from(sorted(METRICS)),
    comparison=st.sampled_from(["<", "<=", ">", ">="]),
    number=st.decimals(0, 1000, places=2),
    unit=st.sampled_from(sorted(UNITS_S)),
    scope=st.sampled_from(["", *SCOPES]),
    space=st.sampled_from(["", " ", "  "]),
)
def test_every_objective_of_the_grammar_is_read(
    percent: str, metric: str, comparison: str, number: object, unit: str, scope: str, space: str
) -> None:
    per = f" per {scope}" if scope else ""
    objective = parse_objective(f"p{percent}({metric}){space}{comparison}{space}{number}{space}{unit}{per}")
    assert objective.percent == float(percent)
    assert (objective.metric, objective.comparison, objective.scope) == (metric, comparison, scope or "overall")
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
        ("p95(ttft) < 4 ms per request", "per adapter and per tenant"),
        ("success_rate > 99", "between 0 and 1"),
        ("success_rate > 1 s", "between 0 and 1"),
        ("fast please", "write one like"),
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


def test_nothing_measured_is_undecided() -> None:
    assert [j.verdict for j in judged("p95(load) < 400 ms", [make_record(i) for i in range(9)])] == [Verdict.UNDECIDED]


def test_unusual_percentiles_means_and_maxima_are_judged() -> None:
    records = [make_record(i, ttft_s=0.1 + i / 1000) for i in range(100)]
    for text in ("p99.9(ttft) < 200 ms", "p12.5(ttft) > 110 ms", "mean(ttft) < 150 ms", "max(ttft) >= 190 ms"):
        assert [j.verdict for j in judged(text, [*records])] == [Verdict.PASS]
    assert [j.verdict for j in judged("answers_per_s >= 10", [*records])] == [Verdict.PASS]
