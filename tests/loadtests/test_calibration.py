import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from loadtests.calibration import (
    CHUNK_OF,
    FILE,
    Case,
    Figure,
    Served,
    ServerLog,
    compare_with_known,
    due_s,
    latest_calibration,
    save_calibration,
)
from loadtests.cli import app
from loadtests.known_server import draw_offsets_s, key_of, row_of
from loadtests.record import Outcome, Record, Run
from loadtests.summary import summarise
from tests.loadtests.factories import make_record, make_run

FROZEN = (10.0, 12.0)
OFFSETS_S = draw_offsets_s()
BEGAN_S = 500.0  # of the run, on the server's clock
KEYS = {f"steady-{number}": key_of(str(number)) for number in range(400)}


def perfect_run(frozen: tuple[float, float] | None = None, late_s: float = 0.0) -> tuple[Run, ServerLog]:
    """As a generator without any error would have measured a server without any; then late_s is added to each answer."""
    records: list[Record] = []
    served: dict[int, Served] = {}
    for number, (name, key) in enumerate(KEYS.items()):
        start_s = 1.0 + number * 0.02
        due = due_s(np.array([start_s + BEGAN_S]), OFFSETS_S[[row_of(key)]], frozen)[0]
        content_s = [float(instant) - BEGAN_S + late_s for instant in due]
        records.append(
            make_record(number, id=name, intended_s=start_s, sent_s=start_s, content_s=content_s, end_s=content_s[-1])
        )
        read_s = start_s + BEGAN_S
        if frozen and frozen[0] <= read_s < frozen[1]:
            read_s = frozen[1]
        served[key] = Served(read_s, tuple(due))
    return make_run(records), ServerLog(served, frozen)


def case_of(run: Run, log: ServerLog, kind: str = "plain") -> Case:
    return compare_with_known(kind, 50, run, summarise(run), KEYS, log)


@given(st.floats(0, 20), st.lists(st.floats(0, 5), min_size=1, max_size=20))
def test_nothing_is_due_while_the_server_is_frozen(start_s: float, gaps_s: list[float]) -> None:
    offsets_s = np.cumsum([gaps_s], axis=1)
    plain, thawed = (due_s(np.array([start_s]), offsets_s, frozen)[0] for frozen in (None, FROZEN))
    assert not ((thawed >= FROZEN[0]) & (thawed < FROZEN[1])).any()
    assert (thawed >= plain).all()
    assert (np.diff(thawed) >= 0).all()
    if plain[-1] < FROZEN[0] or start_s >= FROZEN[1]:
        assert (thawed == plain).all()


def test_a_request_that_comes_while_the_server_is_frozen_begins_at_the_thaw() -> None:
    assert due_s(np.array([10.5]), np.array([[0.1, 0.3]]), FROZEN)[0] == pytest.approx([12.1, 12.3])
    assert due_s(np.array([9.9]), np.array([[0.05, 0.3, 2.5]]), FROZEN)[0] == pytest.approx([9.95, 12.0, 12.4])


@pytest.mark.parametrize("frozen", [None, (BEGAN_S + 3, BEGAN_S + 5)])
def test_a_perfect_measurement_has_no_error(frozen: tuple[float, float] | None) -> None:
    case = case_of(*perfect_run(frozen), kind="freeze" if frozen else "plain")
    assert case.requests == 400
    assert {(figure.metric, figure.percent) for figure in case.figures} == {
        (metric, percent) for metric in CHUNK_OF for percent in (50, 95, 99)
    }
    assert case.worst_error == pytest.approx(0, abs=1e-9)
    assert case.server_late_p99_s == pytest.approx(0, abs=1e-9)
    assert case.within_bar
    if frozen:
        assert max(figure.known_s for figure in case.figures) > 1.5


def test_an_error_is_stated_as_a_share_of_the_known_figure() -> None:
    case = case_of(*perfect_run(late_s=0.010))
    assert not case.within_bar
    for figure in case.figures:
        assert figure.measured_s is not None
        assert figure.measured_s - figure.known_s == pytest.approx(0.010)
        assert figure.error == pytest.approx(0.010 / figure.known_s)


def test_what_the_server_did_late_is_told_apart() -> None:
    run, log = perfect_run()
    late = {key: Served(s.read_s, tuple(w + 0.004 for w in s.written_s)) for key, s in log.served.items()}
    case = case_of(run, ServerLog(late, None))
    assert case.server_late_p99_s == pytest.approx(0.004)
    assert case.worst_error == pytest.approx(0, abs=1e-9)


def test_a_request_that_failed_keeps_it_from_being_within_the_bar() -> None:
    run, log = perfect_run()
    failed = replace(run.records[7], outcome=Outcome.FAILED, content_s=[])
    case = case_of(replace(run, records=(*run.records[:7], failed, *run.records[8:])), log)
    assert case.worst_error < 0.02
    assert (case.not_ok, case.within_bar) == (1, False)


def test_a_figure_that_is_missing_is_as_wrong_as_can_be() -> None:
    assert Figure("ttft", 50, 0.1, None).error == float("inf")


def test_the_latest_calibration_is_found_again(tmp_path: Path) -> None:
    assert latest_calibration(tmp_path) is None
    kept = {"format": "lorikeet.loadtest.calibration", "version": 1, "within_bars": True}
    path = save_calibration(tmp_path, kept)
    assert latest_calibration(tmp_path) == kept
    path.write_text(json.dumps(kept | {"version": 99}))
    assert latest_calibration(tmp_path) is None
    path.write_text("{")
    assert latest_calibration(tmp_path) is None


@pytest.mark.slow
def test_the_command_measures_keeps_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["calibrate", "--rate", "40", "--duration-s", "6", "--json"])
    kept = json.loads((tmp_path / "loadtests" / FILE).read_text())
    assert json.loads(result.stdout) == kept == latest_calibration(tmp_path)
    assert result.exit_code == (0 if kept["within_bars"] else 1)
    plain, freeze = kept["cases"]
    assert (plain["kind"], freeze["kind"]) == ("plain", "freeze")
    assert plain["not_ok"] == freeze["not_ok"] == 0
    assert plain["requests"] == freeze["requests"] > 150  # the same schedule
    known = {(case["kind"], f["metric"], f["percent"]): f["known_s"] for case in kept["cases"] for f in case["figures"]}
    assert known["plain", "ttft", 50] == pytest.approx(0.12, rel=0.15)
    assert known["freeze", "ttft", 99] > 1.5
    measured = {(c["kind"], f["metric"], f["percent"]): f["measured_s"] for c in kept["cases"] for f in c["figures"]}
    assert measured == pytest.approx(known, rel=0.5, abs=0.2)  # on a machine however busy


def test_a_rate_of_nothing_is_wrong_usage() -> None:
    assert CliRunner().invoke(app, ["calibrate", "--rate", "0"]).exit_code == 2
