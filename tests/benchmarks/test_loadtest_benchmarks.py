"""What the load test benchmarks compute; that ours is run and read for real, the other tools are not installed for tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load_tools import (
    Bench,
    CpuMeter,
    Load,
    Measurement,
    Ours,
    Report,
    VllmBench,
    compare,
    even_schedule,
    paced_schedule,
    vllm_delays_s,
)
from benchmarks.loadtest_cost import costs_us, highest, keeps_up
from benchmarks.loadtest_truth import summarise
from loadtests.calibration import Served, ServerLog
from loadtests.known_server import CHUNKS, draw_offsets_s, key_of, row_of

OFFSETS_S = draw_offsets_s()
MEASURED = Measurement(
    tool="ours",
    load=Load(50, 10),
    requests=500,
    errors={"ttft p95": 0.01},
    known_s={"ttft p95": 0.2},
    reported_s={"ttft p95": 0.202},
    answered_share=1.0,
    lag_p99_s=0.001,
    cpu_s=1.0,
    wall_s=10.0,
    server_late_p99_s=0.0001,
)


def served(key: int, read_s: float) -> Served:
    return Served(read_s, tuple(OFFSETS_S[row_of(key)] + read_s))


class StillMeter(CpuMeter):
    def __init__(self) -> None: ...

    def used_s(self, begin_s: float, end_s: float) -> float:
        return 0.1 * (end_s - begin_s)


@given(st.floats(10, 5000), st.floats(1.01, 1.5))
def test_the_search_ends_just_below_the_limit(limit: float, step: float) -> None:
    tried: list[float] = []

    def kept_up(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = highest(kept_up, 80, step=step)
    assert found <= limit < found * step * 1.0001
    assert found in tried
    assert len(tried) < 25


def test_a_search_that_never_succeeds_ends_with_nothing() -> None:
    assert highest(lambda _: False, 80) == 0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, True), ({"lag_p99_s": 0.006}, False), ({"answered_share": 0.98}, False), ({"lag_p99_s": None}, False)],
)
def test_a_rate_is_kept_up_when_nearly_all_leave_on_time(changed: dict[str, float], expected: bool) -> None:
    assert keeps_up(replace(MEASURED, **changed)) is expected  # type: ignore[arg-type]


def test_costs_tell_requests_and_chunks_apart() -> None:
    one = replace(MEASURED, load=Load(50, 10, chunks=1), cpu_s=0.1)
    many = replace(MEASURED, cpu_s=0.1 + 500 * (CHUNKS - 1) * 30e-6)
    found = costs_us([one, many], "ours")
    assert found["request of 1 chunk"] == pytest.approx([200])
    assert found["further chunk"] == pytest.approx([30])


def test_errors_are_summed_up_over_the_rounds_of_a_case() -> None:
    rounds = [replace(MEASURED, errors={"ttft p95": error}) for error in (0.03, 0.01, -0.02)]
    other = replace(MEASURED, load=Load(50, 10, frozen=True))
    assert summarise([*rounds, other])[50, False] == {"ours": {"ttft p95": (0.01, -0.02, 0.03)}}


def test_the_schedule_of_the_other_tool_is_drawn_as_it_draws_it() -> None:
    """vllm/benchmarks/serve.py: get_request."""
    np.random.seed(7)
    delays = [np.random.gamma(shape=1.0, scale=1.0 / 50) for _ in range(100)]
    for i in range(1, len(delays)):
        delays[i] += delays[i - 1]
    factor = (100 / 50) / delays[-1]
    assert vllm_delays_s(50, 100, 7) == pytest.approx([delay * factor for delay in delays])


def test_a_paced_user_asks_every_second_from_its_first_request_on() -> None:
    log = ServerLog({key_of(f"caller {user} question 0"): served(0, 5.0 + user) for user in (0, 1)}, None)
    keys, starts_s = paced_schedule(log, users=3, duration_s=2)  # the third never began
    assert keys == [key_of(f"caller {user} question {number}") for user in (0, 1) for number in (0, 1)]
    assert starts_s.tolist() == [5.0, 6.0, 6.0, 7.0]


def test_a_closed_loop_is_held_against_an_even_open_one_when_the_server_froze() -> None:
    log = ServerLog({key: served(key, read_s) for key, read_s in ((1, 3.0), (2, 3.5), (3, 9.0))}, (4.0, 6.0))
    plain = even_schedule(log, Load(1, 5))
    frozen = even_schedule(log, Load(1, 5, frozen=True))
    assert (plain[0], plain[1].tolist()) == ([1, 2, 3], [3.0, 3.5, 9.0])
    assert (frozen[0], frozen[1].tolist()) == ([1, 2, 3, 1, 2], [3.0, 4.0, 5.0, 6.0, 7.0])


@pytest.mark.parametrize("tool", [Ours(), VllmBench()])
def test_a_tool_is_compared_in_its_own_way_to_take_a_percentile(tool: Ours | VllmBench) -> None:
    keys = list(range(101))
    starts_s = np.array([key * 0.02 for key in keys])
    log = ServerLog({key: served(key, key * 0.02 + 0.003) for key in keys}, None)
    figures_s = {(m, p): 0.2 for m in ("ttft", "e2e") for p in (50.0, 95.0, 99.0)}
    measured = compare(tool, Load(50, 2), Report(figures_s, keys, starts_s), log, StillMeter())
    ttft_s = OFFSETS_S[:101, 0]
    known_s = np.percentile(ttft_s, 95, method="linear" if tool.interpolates else "inverted_cdf")
    assert measured.known_s["ttft p95"] == pytest.approx(known_s)
    assert measured.errors["ttft p95"] == pytest.approx(0.2 / known_s - 1)
    assert measured.lag_p99_s == pytest.approx(0.003)
    assert (measured.requests, measured.answered_share) == (101, 1.0)
    assert measured.cpu_s == pytest.approx(0.1 * measured.wall_s)


@pytest.mark.slow
def test_ours_is_run_and_read(tmp_path: Path) -> None:
    measured = Bench().run(Ours(), Load(30, 3, chunks=3))
    assert measured.answered_share == 1
    assert measured.requests > 60
    assert 0 < measured.cpu_s < measured.wall_s
    assert measured.lag_p99_s is not None
    assert all(abs(error) < 0.5 for error in measured.errors.values())
