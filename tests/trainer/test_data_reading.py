"""Files of rows: every kind gives the same rows, with the lines they stand on."""

import csv
import gzip
import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.reading import find_files, pieces, read_file
from trainer.errors import ConfigError, DataError

ROWS = [{"prompt": f"Question {number}?", "completion": f'Answer "{number}",\nin two lines ä.'} for number in range(3)]


def write(path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    if path.name.endswith(".jsonl"):
        path.write_text(lines.replace("\n", "\n\n", 1))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path)
    read = list(read_file(path))
    assert [orjson.loads(row.data) for row in read] == ROWS
    assert 0 < read[-1].read_bytes <= path.stat().st_size


def test_rows_know_their_lines(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    assert [row.line for row in read_file(tmp_path / "rows.jsonl")] == [1, 3, 4]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", b"no gzip"),
        ("rows.json", b"{"),
        ("rows.csv", b"a\n\xff\n"),
        ("rows.parquet", b"PAR"),
        ("rows.xml", b""),
    ],
)
def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\."):
        list(read_file(path))


def test_texts_are_cut_at_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.md"
    path.write_text("# One\n\nFirst words.\nGo on.\n\n\nSecond part here.\n")
    found = [(row.line, orjson.loads(row.data)["text"]) for row in read_file(path, piece_chars=32)]
    assert found == [(1, "# One\n\nFirst words.\nGo on."), (7, "Second part here.")]


@given(st.lists(st.text(alphabet="ab \n", max_size=40), max_size=8), st.integers(3, 30))
def test_no_word_of_a_text_is_lost_or_made_longer_than_allowed(lines: list[str], limit: int) -> None:
    text = "\n".join(lines)
    cut = [piece for _, piece in pieces(enumerate(text.split("\n"), start=1), limit)]
    assert "".join("".join(cut).split()) == "".join(text.split())
    assert all(0 < len(piece) <= limit for piece in cut)


def test_folders_and_patterns_give_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path)] == ["a.csv", "b.jsonl"]
    assert [path.name for path in find_files(tmp_path / "*.jsonl")] == ["b.jsonl"]
    with pytest.raises(ConfigError, match="no such file"):
        find_files(tmp_path / "missing.jsonl")
