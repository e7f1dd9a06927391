from dataclasses import replace
from typing import Any

import pytest

from loadtests import figures
from loadtests.record import Mark, Outcome, PhaseWindow, Record, Run, Sample
from loadtests.stats import Estimate
from loadtests.summary import summarise
from loadtests.working_set import Cliff, Row, WorkingSet
from tests.loadtests.factories import make_record, make_run

pytestmark = pytest.mark.slow  # draws whole reports

PHASES = ("steady", "churn")
WINDOWS = (
    PhaseWindow("warm-up", False, 0.0, 10.0),
    PhaseWindow("steady", True, 10.0, 20.0),
    PhaseWindow("churn", True, 20.0, 30.0),
)


def two_phases(*more: Record, **scenario: Any) -> Run:
    """Forty adapters in churn, two of them in steady, where b is the slow one."""
    steady = [make_record(i, adapter="ab"[i % 2], ttft_s=0.1 + i % 2, load_s=0.0) for i in range(40)]
    churn = [make_record(i, adapter=f"c{i % 40}", ttft_s=0.3, phase="churn", load_s=0.2) for i in range(80)]
    phases = [{"name": name, "duration_s": 10} for name in PHASES]
    return replace(make_run([*steady, *churn, *more], phases=phases, **scenario), windows=WINDOWS)


def limits(*objectives: str) -> list[float | None]:
    """In churn, in steady, in all phases."""
    summary = summarise(two_phases(objectives=list(objectives)))
    return [figures.limit_in(summary, "ttft", phase) for phase in ("churn", "steady", None)]


def test_an_objective_is_drawn_in_the_phases_it_holds_in() -> None:
    assert limits("p95(ttft) < 1 s") == [1.0, 1.0, 1.0]
    assert limits("p95(ttft) < 1 s in churn") == [1.0, None, None]
    assert limits("p95(ttft) < 2 s", "p95(ttft) < 1 s per adapter in ch*") == [1.0, 2.0, 2.0]


def test_only_objectives_that_the_p95_must_keep_are_drawn_against_it() -> None:
    assert limits("p50(ttft) < 1 s", "mean(ttft) < 2 s", "p95(ttft) > 3 s", "p95(e2e) < 4 s") == [None] * 3
    assert limits("max(ttft) < 5 s", "p99(ttft) < 4 s") == [4.0] * 3
    assert limits("p99(ttft) < 4 s", "p95(ttft) < 6 s") == [6.0] * 3


def test_the_adapters_are_shown_where_the_objective_judges_them_the_slowest_first() -> None:
    summary = summarise(two_phases(objectives=["p95(ttft) < 500 ms per adapter in steady"]))
    found = figures.adapter_bars(summary)
    assert found.title == "Time to first token by adapter in steady"
    assert found.svg.count("<rect") == 2
    assert found.svg.index(">b<") < found.svg.index(">a<")
    assert found.svg.count('class="bar bad"') == 1


def test_of_many_adapters_the_slowest_are_shown_and_the_others_counted() -> None:
    found = figures.adapter_bars(summarise(two_phases()))
    assert found.title == "Time to first token by adapter"
    assert found.svg.count("<rect") == figures.BAR_ROWS
    assert ">b<" in found.svg
    assert "18 more" in found.note


def test_groups_are_compared_only_where_there_are_two() -> None:
    summary = summarise(two_phases())
    assert figures.group_bars(summary, "phase").count("<rect") == 2
    assert figures.group_bars(summary, "temperature").count("<rect") == 2
    assert figures.group_bars(summary, "visit") == ""


def test_distributions_are_drawn_by_phase_and_adapter_and_warm_against_cold() -> None:
    run = two_phases(objectives=["p95(ttft) < 2 s per adapter in steady"])
    titles = {figure.title: len(figure.key) for figure in figures.curves(run, summarise(run))}
    assert titles == {
        "Time to first token by phase": 2,
        "Time to first token by adapter in steady": 2,
        "Time to first token warm and cold": 2,
        "End-to-end time by phase": 2,
        "End-to-end time by adapter": 8,
    }


def test_an_adapters_distribution_is_that_of_the_phases_shown() -> None:
    elsewhere = make_record(1, adapter="a", phase="churn", ttft_s=9.0)
    run = two_phases(elsewhere, objectives=["p95(ttft) < 2 s per adapter in steady"])
    (figure,) = (figure for figure in figures.curves(run, summarise(run)) if figure.title.endswith("in steady"))
    paths = [curve.partition("<title>")[0] for curve in figure.svg.split('<path class="curve')[1:]]
    assert [path.count("H") for path in paths] == [20, 20]


def test_a_run_with_nothing_to_compare_still_has_a_distribution() -> None:
    run = make_run([make_record(i) for i in range(20)])
    (figure,) = figures.curves(run, summarise(run))
    assert figure.svg.count('class="curve') == 1


def test_the_plot_over_time_shows_what_each_answer_was_worth() -> None:
    run = two_phases(
        make_record(1, phase="warm-up", ttft_s=9.0),
        make_record(2, wrong="legal", adapter="a"),
        make_record(3, outcome=Outcome.REFUSED),
        make_record(4, outcome=Outcome.CENSORED),
        objectives=["p95(ttft) < 500 ms"],
    )
    found = figures.over_time(run, summarise(run))
    assert found.key == {"good": "good", "beyond a limit": "slow", "somebody else's": "wrong", "adapter cold": "cold"}
    for css, dots in {"unjudged": 1, "slow": 20, "wrong": 1}.items():
        assert found.svg.partition(f'<g class="dots {css}">')[2].partition("</g>")[0].count("<circle") == dots
    assert [name for name in ("1 wrong", "1 failed", "1 refused", "1 cut off") if f">{name}<" in found.svg] == [
        "1 wrong",
        "1 refused",
        "1 cut off",
    ]


def test_events_and_scraped_metrics_share_the_time_axis() -> None:
    samples = tuple(Sample(float(i), {"gateway:waiting_requests": 1.0, "gateway:slots": 2.0}) for i in range(30))
    run = replace(two_phases(), events=(Mark("kill", 25.0, 26.0),), samples=samples)
    drawing = figures.over_time(run, summarise(run)).svg
    assert ">kill</text>" in drawing
    assert ">waiting requests</text>" in drawing
    assert ">slots</text>" in drawing


def found(*rows: tuple[float | None, float], why: str) -> WorkingSet:
    made = tuple(
        Row(2**i, "", 100, None if p95 is None else Estimate(p95, p95, p95), goodput, 1.0)
        for i, (p95, goodput) in enumerate(rows, start=1)
    )
    return WorkingSet("set", "ttft", made, Cliff(2 ** (len(rows) - 1), 2 ** len(rows), why) if why else None)


@pytest.mark.parametrize(
    ("working_set", "words"),
    [
        (found((0.1, 1.0), (0.1, 1.0), why=""), "No cliff: from 2 to 4 adapters nothing gave way clearly."),
        (
            found((0.2, 1.0), (0.1, 1.0), (1.0, 1.0), why="p95"),
            "The cliff: 4 adapters fit, 8 do not. With 8, P95 ttft is 1 s, 10 times that of the best smaller size.",
        ),
        (
            found((None, 0.98), (None, 0.2), why="goodput"),
            "The cliff: 2 adapters fit, 4 do not. With 4, 20% of the requests are good instead of 98%.",
        ),
    ],
)
def test_the_cliff_is_named_in_words(working_set: WorkingSet, words: str) -> None:
    assert figures.describe_cliff(working_set) == words
