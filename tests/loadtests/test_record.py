from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.errors import RecordError
from loadtests.record import Mark, Outcome, Sample, read_run, write_run
from loadtests.report import render_report
from loadtests.summary import summarise
from tests.loadtests.factories import make_record, make_run

VERSION_1 = Path(__file__).parent / "data" / "records-v1.jsonl"


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    records = [make_record(i, ttft_s=i / 16) for i in range(5)] + [make_record(9, outcome=Outcome.FAILED, error="x")]
    run = make_run(records, objectives=["p95(ttft) < 1 s"])
    write_run(tmp_path / "records.jsonl", run)
    again = read_run(tmp_path / "records.jsonl")
    assert [record.id for record in again.records] == [record.id for record in records]
    assert [record.outcome for record in again.records] == [record.outcome for record in records]
    for one, other in zip(again.records, records, strict=True):
        assert one.content_s == pytest.approx(other.content_s, abs=1e-6)
    assert (again.scenario, again.windows, again.health) == (run.scenario, run.windows, run.health)
    assert summarise(again).verdict == summarise(run).verdict


def test_what_happened_beside_the_requests_comes_back(tmp_path: Path) -> None:
    extras: dict[str, Any] = {
        "overhead_s": 0.002,
        "retry_after_s": 3.0,
        "visit": "again",
        "turn": 2,
        "wrong": "answered by legal@1",
    }
    run = replace(
        make_run([make_record(1, **extras)]),
        events=(Mark("upload", 2.0, 2.5), Mark("kill", 3.0, 3.1, "connection refused")),
        samples=(Sample(1.0, {"engine:running": 3.0}), Sample(2.0, {})),
        calibration={"p95_error": 0.01},
    )
    write_run(tmp_path / "records.jsonl", run)
    again = read_run(tmp_path / "records.jsonl")
    assert {name: getattr(again.records[0], name) for name in extras} == extras
    assert (again.events, again.samples, again.calibration) == (run.events, run.samples, run.calibration)


def test_a_file_of_version_1_is_still_judged_and_drawn() -> None:
    run = read_run(VERSION_1)
    assert (len(run.records), run.events, run.samples, run.calibration) == (12, (), (), None)
    assert {record.wrong + record.visit for record in run.records} == {""}
    summary = summarise(run)
    assert summary.overall.metrics["ttft"].count == 11
    assert "support" in render_report(run, summary)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no load test records"),
        (b'{"format": "other"}\n', "no load test records"),
        (b'{"format": "lorikeet.loadtest.records", "version": 99}\n', "version 99"),
        (b'{"format": "lorikeet.loadtest.records", "version": 1}\n', "damaged"),
        (b"not json\n", "damaged"),
    ],
)
def test_a_file_that_is_no_run_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(RecordError, match=said):
        read_run(tmp_path / "records.jsonl")


def test_a_file_cut_at_the_end_of_a_line_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_run(path, make_run([make_record(i) for i in range(5)]))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(RecordError, match="holds 3 of 5 records"):
        read_run(path)
    # as written before: without the count, and with a mark in each record
    path.write_bytes(
        b"".join([lines[0].replace(b'"records":5,', b""), *lines[1:]]).replace(b'"wrong"', b'"mark":"3f2a","wrong"')
    )
    assert len(read_run(path).records) == 5


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        read_run(tmp_path / "records.jsonl")
