"""The records as a table for spreadsheets and notebooks: one row a request, seconds throughout."""

import csv
from collections.abc import Sequence
from pathlib import Path

from loadtests.record import METRICS, ONE_A_REQUEST, Record

RAW = (
    *(
        "id",
        "phase",
        "tenant",
        "adapter",
        "served_by",
        "stream",
        "turn",
        "visit",
        "outcome",
        "status",
        "error",
        "wrong",
    ),
    *("finish_reason", "prompt_tokens", "output_tokens", "intended_s", "sent_s", "headers_s", "end_s", "retry_after_s"),
)


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """What a request has no value of stays empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*RAW, "chunks", *(f"{metric}_s" for metric in ONE_A_REQUEST)])
        for record in records:
            derived = [round(value[0], 6) if (value := METRICS[metric](record)) else "" for metric in ONE_A_REQUEST]
            writer.writerow([*(getattr(record, name) for name in RAW), len(record.content_s), *derived])
