"""Files of rows, one row at a time: JSONL (also gzipped), JSON, CSV, parquet, text. A .json file alone is read whole."""

import csv
import gzip
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from trainer.errors import ConfigError, DataError, RowFault

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".parquet", *TEXT_SUFFIXES)
PIECE_CHARS = 8000
PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as JSON bytes. line: counted from 1, in the file; read_bytes: how far the file has been read."""

    line: int
    data: bytes
    read_bytes: int


def find_files(path: Path) -> list[Path]:
    """A file, every known file below a folder, or what a pattern matches; sorted. Raises ConfigError where that is none."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.is_file() and each.name.endswith(SUFFIXES))
    else:
        root = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(each for each in root.glob(str(path.relative_to(root))) if each.is_file())
    if not found:
        raise ConfigError(f"{path}: no such file, and no files of a known kind ({', '.join(SUFFIXES)}) there.")
    return found


def read_file(path: Path, *, piece_chars: int = PIECE_CHARS) -> Iterator[RawRow]:
    """Rows of one file; blank lines are skipped. Texts are cut at paragraph ends. Raises DataError."""
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".ndjson", ".jsonl.gz")):
            yield from _lines(path)
        elif name.endswith(".json"):
            yield from _json(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        elif name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(TEXT_SUFFIXES):
            yield from _text(path, piece_chars)
        else:
            raise DataError(path, [RowFault(0, f"is of no kind known here: {', '.join(SUFFIXES)}")])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, orjson.JSONDecodeError) as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(bytes to read, file whose position tells how far)."""
    with path.open("rb") as file:
        if path.name.lower().endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield io.BufferedReader(unpacked), file
        else:
            yield file, file


def _lines(path: Path) -> Iterator[RawRow]:
    with _opened(path) as (lines, file):
        packed = lines is not file
        read_bytes = 0
        for number, line in enumerate(lines, start=1):
            read_bytes = file.tell() if packed else read_bytes + len(line)
            data = line.strip().removeprefix(b"\xef\xbb\xbf")
            if data:
                yield RawRow(number, data, read_bytes)


def _json(path: Path) -> Iterator[RawRow]:
    content = path.read_bytes()
    value = orjson.loads(content)
    if isinstance(value, dict):  # {"data": […]}, or one row
        lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        value = lists[0] if len(lists) == 1 and "messages" not in value and "conversations" not in value else [value]
    if not isinstance(value, list):
        raise DataError(path, [RowFault(0, "is neither a list of rows nor an object that holds one")])
    for number, each in enumerate(value, start=1):
        yield RawRow(number, orjson.dumps(each), len(content) * number // len(value))


def _csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            fields = {name: text for name, text in row.items() if name is not None}
            yield RawRow(rows.line_num, orjson.dumps(fields), file.tell())


def _parquet(path: Path) -> Iterator[RawRow]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    size_bytes = path.stat().st_size
    try:
        with ParquetFile(path) as file:
            total = max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, orjson.dumps(row, default=str), size_bytes * number // total)
    except ArrowInvalid as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc


def _text(path: Path, piece_chars: int) -> Iterator[RawRow]:
    with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        for line, piece in pieces(enumerate(lines, start=1), piece_chars):
            yield RawRow(line, orjson.dumps({"text": piece}), file.tell())


def pieces(lines: Iterable[tuple[int, str]], piece_chars: int) -> Iterator[tuple[int, str]]:
    """Whole paragraphs, joined while they fit into piece_chars, with the number of their first line.

    A paragraph that is longer by itself is cut at spaces, so nothing is lost.
    """
    held: list[str] = []
    size, first = 0, 0
    for line, paragraph in _paragraphs(lines, piece_chars):
        if held and size + 2 + len(paragraph) > piece_chars:
            yield first, "\n\n".join(held)
            held, size = [], 0
        if not held:
            first = line
        held.append(paragraph)
        size += len(paragraph) + (2 if size else 0)
    if held:
        yield first, "\n\n".join(held)


def _paragraphs(lines: Iterable[tuple[int, str]], limit: int) -> Iterator[tuple[int, str]]:
    held = ""
    first = 0
    for number, line in lines:
        text = line.rstrip()
        if not text:
            if held:
                yield first, held
            held = ""
            continue
        if not held:
            first = number
        held = f"{held}\n{text}" if held else text
        while len(held) > limit:
            at = held.rfind(" ", 1, limit + 1)
            cut = at if at > 0 else limit
            yield first, held[:cut].rstrip()
            held, first = held[cut:].lstrip(), number
    if held:
        yield first, held
