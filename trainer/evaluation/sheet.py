"""Fifty answers for a person to read: a page with a place to mark each, and the marks read back.

The page needs no network and sends nothing: its button saves `marks.jsonl`, which `lorikeet eval sheet import` reads.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adapters.evaluations import SheetSignature
from trainer.errors import DataError, EvaluationError, RowFault

SHEET_FILE, PAGE_FILE = "sheet.jsonl", "sheet.html"
TEMPLATE = Path(__file__).with_name("sheet.html.jinja")
Mark = Literal["good", "bad"]


@dataclass(frozen=True)
class Entry:
    """One answer, and what a person thinks of it. Whether it counts as right is not on the sheet: it would lead the eye."""

    id: str
    model: str
    messages: list[dict[str, str]]
    wanted: str
    given: str
    verdict: Mark | None = None
    comment: str = ""


def choose_entries(document: Mapping[str, Any], count: int, *, seed: int = 0) -> list[Entry]:
    """`count` of the adapter's answers, drawn by seed from a report of `lorikeet eval`."""
    answers = list(document["answers"])
    chosen = sorted(random.Random(seed).sample(range(len(answers)), min(count, len(answers))))  # noqa: S311 - no secret
    return [
        Entry(
            f"row-{index}",
            document["model"],
            answers[index]["messages"],
            answers[index]["wanted"],
            answers[index]["adapter"]["given"],
        )
        for index in chosen
    ]


def digest_of(entries: Sequence[Entry]) -> str:
    """Of the answers that were read, without the marks."""
    read = [[entry.id, entry.model, entry.messages, entry.given] for entry in entries]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def write_sheet(entries: Sequence[Entry], folder: Path) -> Path:
    """The page; beside it the rows. Marks that are there already are kept on both."""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    write_entries(entries, folder / SHEET_FILE)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        entries=[asdict(entry) for entry in entries],
        model=entries[0].model if entries else "",
        data=[asdict(entry) for entry in entries],
    )
    path = folder / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def write_entries(entries: Sequence[Entry], path: Path) -> None:
    """Whole or not at all: marks are somebody's work."""
    scratch = path.with_suffix(".part")
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
    scratch.write_text(lines, encoding="utf-8")
    scratch.replace(path)


def read_entries(path: Path) -> list[Entry]:
    """Raises DataError."""
    entries: list[Entry] = []
    faults: list[RowFault] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = Entry(**json.loads(line))
            if entry.verdict not in (None, "good", "bad"):
                raise ValueError(f"'{entry.verdict}' is neither good nor bad")
            entries.append(entry)
        except (ValueError, TypeError) as exc:
            faults.append(RowFault(number, str(exc)))
    if faults:
        raise DataError(path, faults)
    return entries


def with_marks(entries: Sequence[Entry], marks: Sequence[Entry]) -> list[Entry]:
    """The sheet with another copy's marks laid over it. Raises EvaluationError where that is of another sheet."""
    found = {mark.id: mark for mark in marks}
    strange = found.keys() - {entry.id for entry in entries}
    differing = [entry.id for entry in entries if entry.id in found and found[entry.id].given != entry.given]
    if strange or differing:
        raise EvaluationError(f"These marks are of another sheet: {', '.join(sorted(strange | set(differing))[:5])}.")
    return [
        replace(entry, verdict=mark.verdict or entry.verdict, comment=mark.comment or entry.comment)
        if (mark := found.get(entry.id))
        else entry
        for entry in entries
    ]


def sign(entries: Sequence[Entry], *, by: str, now_s: float) -> SheetSignature:
    """Raises EvaluationError when nothing is marked."""
    good, bad = (sum(entry.verdict == mark for entry in entries) for mark in ("good", "bad"))
    if not good + bad:
        raise EvaluationError("Nothing on the sheet is marked yet: lorikeet eval sheet mark FOLDER")
    return SheetSignature(
        rows=len(entries), good=good, bad=bad, signed_by=by, signed_at=int(now_s), sheet_sha256=digest_of(entries)
    )
