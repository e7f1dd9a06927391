import csv
from pathlib import Path

import pytest

from loadtests.export import write_csv
from loadtests.record import Outcome
from tests.loadtests.factories import make_record


def test_every_request_is_a_row_with_its_times_in_seconds(tmp_path: Path) -> None:
    records = [
        make_record(1, ttft_s=0.25, queue_s=0.125, visit="again"),
        make_record(2, outcome=Outcome.REFUSED, status=429, retry_after_s=3.0, error='said "no",\nand more'),
        make_record(3, outcome=Outcome.CENSORED, sent_s=None, end_s=None, status=None),
    ]
    write_csv(tmp_path / "records.csv", records)
    with (tmp_path / "records.csv").open(encoding="utf-8", newline="") as file:
        answered, refused, unsent = csv.DictReader(file)
    assert [row["id"] for row in (answered, refused, unsent)] == ["steady-1", "steady-2", "steady-3"]
    assert float(answered["ttft_s"]) == pytest.approx(0.25)
    assert float(answered["e2e_s"]) == pytest.approx(0.27)
    assert (answered["queue_s"], answered["chunks"], answered["visit"]) == ("0.125", "3", "again")
    assert (refused["outcome"], refused["retry_after_s"], refused["error"]) == (
        "refused",
        "3.0",
        'said "no",\nand more',
    )
    assert (refused["ttft_s"], unsent["sent_s"], unsent["status"], unsent["lag_s"]) == ("", "", "", "")
