"""Recorded traffic of real services, read from the formats it is published in.

azure      CSV TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces 2023 and 2024)
burstgpt   CSV Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type
mooncake   JSONL timestamp in ms, input_length, output_length, hash_ids (one per 512 tokens of the prompt)
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import orjson

from loadtests.errors import ScenarioError
from loadtests.loads import TraceLoad

BLOCK_TOKENS = 512  # of the prompt, that one Mooncake hash stands for


@dataclass(frozen=True)
class TraceRow:
    """A request as recorded."""

    at_s: float  # from the first row; after replay(), from the phase's start
    prompt_tokens: int
    output_tokens: int  # 0 where the recorded request failed: it came all the same
    session: str = ""  # rows of one session are one user's; empty where the trace does not tell
    blocks: tuple[int, ...] = ()  # equal numbers at the beginning: equal beginnings of the prompts


def read_trace(path: Path, format: str) -> Iterator[TraceRow]:  # noqa: A002  the scenario's word for it
    """Rows as they are read, so that a week's trace costs no more than the part that is used.

    Raises ScenarioError when the file cannot be read, a row is malformed, or rows are not in the order of time.
    """
    lines, parse = _READERS[format]
    first_s, last_s = None, -math.inf
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in lines(file):
                try:
                    row = parse(line)
                    if not math.isfinite(row.at_s) or row.prompt_tokens < 0 or row.output_tokens < 0:
                        raise ValueError("a number that no request can have")
                    if row.at_s < last_s:
                        raise ValueError("earlier than the row before it; sort the trace by time")
                except (KeyError, TypeError, ValueError) as exc:
                    said = f"no field {exc}" if isinstance(exc, KeyError) else str(exc)
                    raise ScenarioError(
                        str(path), [f"line {number}: not a row of the {format} format: {said}"]
                    ) from exc
                last_s = row.at_s
                first_s = last_s if first_s is None else first_s
                yield replace(row, at_s=row.at_s - first_s)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ScenarioError(str(path), [f"cannot be read: {exc}"]) from exc


def replay(rows: Iterable[TraceRow], load: TraceLoad, duration_s: float) -> list[TraceRow]:
    """The rows that fall into a phase of duration_s, at the load's speed, from its start_s on. Reads no further."""
    replayed = []
    for row in rows:
        at_s = (row.at_s - load.start_s) / load.speed
        if at_s >= duration_s:
            break
        if at_s >= 0:
            replayed.append(replace(row, at_s=at_s))
    return replayed


def _csv_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(file)
    return ((reader.line_num, row) for row in reader)


def _json_lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _azure(row: Mapping[str, str]) -> TraceRow:
    at = datetime.fromisoformat(row["TIMESTAMP"])
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return TraceRow(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burstgpt(row: Mapping[str, str]) -> TraceRow:
    tokens = int(row["Request tokens"]), int(row["Response tokens"])
    return TraceRow(float(row["Timestamp"]), *tokens, session=row.get("Session ID") or "")


def _mooncake(line: str) -> TraceRow:
    row = orjson.loads(line)
    blocks = tuple(int(block) for block in row["hash_ids"])
    # Most requests of a trace begin with the same block, its system prompt; the second is the first of the user's own.
    session = str(blocks[:2][-1]) if blocks else ""
    return TraceRow(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), session, blocks)


_READERS: dict[str, tuple[Callable[[TextIO], Iterator[tuple[int, Any]]], Callable[[Any], TraceRow]]] = {
    "azure": (_csv_rows, _azure),
    "burstgpt": (_csv_rows, _burstgpt),
    "mooncake": (_json_lines, _mooncake),
}
