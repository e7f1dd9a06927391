from collections.abc import Sequence

import pytest

from loadtests.groups import Columns, groups
from loadtests.phases import Phase, expand_working_sets
from loadtests.record import Outcome, PhaseWindow
from loadtests.stats import Estimate
from loadtests.working_set import Cliff, Row, find_cliff, working_sets
from tests.loadtests.factories import make_record


def rows(*figures: tuple[float | None, float], spread: float = 0.05, judged: int = 400) -> list[Row]:
    """figures: P95 and goodput of sizes 1, 2, 4, …"""
    made = []
    for power, (p95, goodput) in enumerate(figures):
        estimate = None if p95 is None else Estimate(p95, p95 * (1 - spread), p95 * (1 + spread))
        made.append(Row(2**power, f"sweep-{2**power}", judged, estimate, goodput, goodput * 10))
    return made


@pytest.mark.parametrize(
    ("sweep", "cliff"),
    [
        (rows((0.1, 1.0), (0.11, 1.0), (0.5, 1.0), (0.9, 1.0)), Cliff(2, 4, "p95")),
        (rows((0.1, 1.0), (0.11, 0.99), (0.12, 0.6)), Cliff(2, 4, "goodput")),
        (rows((0.1, 1.0), (2.0, 0.5)), Cliff(1, 2, "p95 and goodput")),
        (rows((0.1, 1.0), (None, 0.0)), Cliff(1, 2, "goodput")),
        (rows((0.1, 1.0), (0.12, 1.0), (0.14, 1.0), (0.17, 1.0)), Cliff(4, 8, "p95")),  # in small steps
        (rows((0.1, 1.0), (0.12, 1.0), (0.13, 0.95)), None),
        (rows((0.3, 1.0), (0.1, 1.0), (0.12, 1.0)), None),  # a slow first size is no cliff
        (rows((0.1, 1.0), (0.2, 1.0), spread=0.4), None),  # the intervals overlap
        (rows((0.1, 1.0), (0.1, 0.8), judged=10), None),  # two of ten: may be chance
        (rows((0.1, 1.0)), None),
        ([], None),
    ],
)
def test_the_cliff_is_the_first_size_that_is_clearly_worse_than_the_best_smaller_one(
    sweep: Sequence[Row], cliff: Cliff | None
) -> None:
    assert find_cliff(sweep) == cliff


def test_a_working_set_is_read_from_the_phases_it_was_expanded_into() -> None:
    phases = expand_working_sets(
        [
            Phase(name="warm-up", duration_s=1, measured=False, adapters=4),
            Phase(name="sweep", duration_s=5, working_set=[8, 2, 4]),
            Phase(name="steady-4", duration_s=5, adapters=4),  # alone: no sweep
            Phase(name="run-2", duration_s=5),
        ]
    )
    windows = [PhaseWindow(phase.name, phase.measured, i * 5.0, i * 5.0 + 5) for i, phase in enumerate(phases)]
    records = [
        make_record(100 * size + i, phase=f"sweep-{size}", ttft_s=0.1 if size < 8 else 2.0)
        for size in (2, 4, 8)
        for i in range(50)
    ]
    records.append(make_record(1, phase="sweep-2", outcome=Outcome.FAILED))
    (found,) = working_sets(
        phases, groups(Columns(records, {"sweep-8": {"ttft": 0.4}}), windows, seed=0), sample_floor=50
    )
    assert (found.name, found.metric, [row.size for row in found.rows]) == ("sweep", "ttft", [2, 4, 8])
    assert [row.goodput for row in found.rows] == [50 / 51, 1.0, 0.0]
    assert [row.p95.value for row in found.rows if row.p95] == pytest.approx([0.1, 0.1, 2.0])
    assert found.cliff == Cliff(4, 8, "p95 and goodput")


def test_where_nothing_streams_the_end_to_end_time_is_shown() -> None:
    phases = expand_working_sets([Phase(name="sweep", duration_s=5, working_set=[1, 2])])
    windows = [PhaseWindow(phase.name, True, 0.0, 5.0) for phase in phases]
    records = [make_record(i, phase=phase.name, stream=False) for phase in phases for i in range(5)]
    (found,) = working_sets(phases, groups(Columns(records), windows, seed=0), sample_floor=5)
    assert found.metric == "e2e"
    assert all(row.p95 for row in found.rows)


def test_a_size_of_few_requests_is_not_judged_for_a_cliff() -> None:
    phases = expand_working_sets([Phase(name="sweep", duration_s=5, working_set=[1, 2, 4])])
    windows = [PhaseWindow(phase.name, True, 0.0, 20.0) for phase in phases]
    records = [
        make_record(i, phase=f"sweep-{size}", ttft_s=0.1 * size)
        for size, count in ((1, 50), (2, 49), (4, 50))
        for i in range(count)
    ]
    (found,) = working_sets(phases, groups(Columns(records), windows, seed=0), sample_floor=50)
    assert [row.note for row in found.rows] == ["", "49 of 50 samples needed", ""]
    assert found.cliff == Cliff(1, 4, "p95")
