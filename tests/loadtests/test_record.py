from pathlib import Path

import pytest

from loadtests.errors import RecordError
from loadtests.record import Outcome, read_run, write_run
from loadtests.summary import summarise
from tests.loadtests.factories import make_record, make_run


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


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        read_run(tmp_path / "records.jsonl")
