"""What a file holds and what is wrong with it, row by row: the same checks that a build makes, nothing changed or kept."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict

from trainer.data.account import QUANTILES
from trainer.data.card import DataFormat
from trainer.data.formats import MADE_OF, answered, recognise, to_value
from trainer.data.reading import find_files, read_file
from trainer.data.recipe import LengthConfig, QualityConfig
from trainer.data.rules import length_fault, quality_fault

MOST_FAULTS = 10_000  # listed; all are counted
TICK_ROWS = 5000


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fault(_Frozen):
    """One row's complaint. fatal: a build would reject the row whatever its configuration."""

    file: str
    line: int
    message: str
    fatal: bool


class Inspection(_Frozen):
    rows: int
    formats: dict[str, int]
    faulty: int
    warned: int
    answer_chars: dict[str, float] | None
    faults: tuple[Fault, ...]


def inspect_files(path: Path, limits: LengthConfig, tell: Callable[[int], None] = lambda rows: None) -> Inspection:
    """Streams. Raises ConfigError where there is no such file, DataError where one cannot be read."""
    formats: Counter[str] = Counter()
    faults: list[Fault] = []
    lengths: Counter[int] = Counter()
    rows = faulty = warned = 0
    for file in find_files(path):
        for row in read_file(file, piece_chars=limits.max_chars):
            rows += 1
            if rows % TICK_ROWS == 0:
                tell(rows)
            message, fatal = _fault(row.data, limits, formats, lengths)
            if message is None:
                continue
            faulty += fatal
            warned += not fatal
            if len(faults) < MOST_FAULTS:
                faults.append(Fault(file=file.name, line=row.line, message=message, fatal=fatal))
    return Inspection(
        rows=rows,
        formats=dict(formats.most_common()),
        faulty=faulty,
        warned=warned,
        answer_chars=_quantiles(lengths),
        faults=tuple(faults),
    )


def _fault(data: bytes, limits: LengthConfig, formats: Counter[str], lengths: Counter[int]) -> tuple[str | None, bool]:
    """(what is wrong, whether the row is of no use). Counts the row's format and length."""
    try:
        raw = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        formats["unknown"] += 1
        return f"not JSON: {exc.msg} at column {exc.colno}", True
    kind = recognise(raw)
    formats[kind or "unknown"] += 1
    wanted: DataFormat = next((name for name, kinds in MADE_OF.items() if kind in kinds), "chat")
    value = to_value(raw, wanted, kind)
    if isinstance(value, str):
        return value, True
    for text in answered(value)[:1]:
        lengths[len(text)] += 1
    if wanted == "text":
        return quality_fault(value, QualityConfig()), False
    return length_fault(value, limits) or quality_fault(value, QualityConfig()), False


def _quantiles(lengths: Counter[int]) -> dict[str, float] | None:
    total = sum(lengths.values())
    if not total:
        return None
    wanted = [(f"p{round(share * 100)}", share * (total - 1)) for share in QUANTILES]
    found: dict[str, float] = {}
    seen = 0
    for length, count in sorted(lengths.items()):
        seen += count
        for name, place in wanted:
            if name not in found and seen > place:
                found[name] = float(length)
    return found
