"""The sheet for people: drawn, marked, read back, signed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.evaluate import eval_app
from trainer.data.sources import question_row
from trainer.errors import ConfigError, DataError, EvaluationError
from trainer.evaluation.sheet import (
    PAGE_FILE,
    SHEET_FILE,
    Entry,
    choose_entries,
    digest_of,
    read_entries,
    sign,
    with_marks,
    write_entries,
    write_sheet,
)

DOCUMENT = {
    "model": "support@2",
    "answers": [
        {"messages": question_row(f"question {n}", "x")[:1], "wanted": "w", "adapter": {"given": f"</script>{n}"}}
        for n in range(80)
    ],
}


def sheet() -> list[Entry]:
    return choose_entries(DOCUMENT, 50)


def test_fifty_are_drawn_by_seed_and_never_more_than_there_are() -> None:
    assert len(sheet()) == 50
    assert sheet() == sheet() != choose_entries(DOCUMENT, 50, seed=1)
    assert len(choose_entries(DOCUMENT, 500)) == 80


def test_the_page_needs_no_network_and_no_answer_breaks_out_of_it(tmp_path: Path) -> None:
    page = write_sheet(sheet(), tmp_path).read_text()
    assert len(re.findall(r"<article ", page)) == 50
    assert page.count("</script>") == 2  # its own two, none of an answer
    assert not re.search(r'(src|href)="?http', page)
    assert read_entries(tmp_path / SHEET_FILE) == sheet()


def test_marks_are_laid_over_the_sheet_they_are_of(tmp_path: Path) -> None:
    marked = [replace(sheet()[0], verdict="bad", comment="rude"), replace(sheet()[1], verdict="good")]
    write_entries(marked, tmp_path / "marks.jsonl")
    found = with_marks(sheet(), read_entries(tmp_path / "marks.jsonl"))
    assert [(one.verdict, one.comment) for one in found[:3]] == [("bad", "rude"), ("good", ""), (None, "")]
    assert digest_of(found) == digest_of(sheet())
    signature = sign(found, by="ann", now_s=7.9)
    assert (signature.good, signature.bad, signature.rows, signature.signed_at) == (1, 1, 50, 7)
    with pytest.raises(EvaluationError, match="another sheet"):
        with_marks(sheet(), [replace(sheet()[0], given="something else")])


def test_nothing_marked_cannot_be_signed() -> None:
    with pytest.raises(EvaluationError, match="Nothing on the sheet is marked"):
        sign(sheet(), by="ann", now_s=0)


def test_a_mark_that_is_none_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / SHEET_FILE
    write_entries(sheet()[:2], path)
    path.write_text(path.read_text().replace('"verdict": null', '"verdict": "meh"', 1))
    with pytest.raises(DataError, match=r"sheet\.jsonl:1: 'meh'"):
        read_entries(path)


def test_a_person_marks_in_the_terminal_and_signs(tmp_path: Path) -> None:
    write_sheet(sheet()[:4], tmp_path)
    run = CliRunner()
    shown = run.invoke(eval_app, ["sheet", "mark", str(tmp_path)], input="g\nb\nwrong\nq\n", catch_exceptions=False)
    assert "2 of 4 marked" in shown.stdout
    assert [entry.comment for entry in read_entries(tmp_path / SHEET_FILE)] == ["", "wrong", "", ""]
    with pytest.raises(ConfigError, match="--by"):
        run.invoke(eval_app, ["sheet", "import", str(tmp_path)], catch_exceptions=False)
    signed = run.invoke(eval_app, ["sheet", "import", str(tmp_path), "--by", "ann"], catch_exceptions=False)
    assert "1 good, 1 bad of 4" in signed.stdout
    assert 'value="bad" checked' in (tmp_path / PAGE_FILE).read_text()


def test_a_sheet_is_not_drawn_over_marks(tmp_path: Path) -> None:
    write_sheet(sheet(), tmp_path)
    (tmp_path / "report.json").write_text('{"model": "support@2", "answers": []}')
    arguments = ["sheet", "make", str(tmp_path / "report.json"), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match="may hold marks"):
        CliRunner().invoke(eval_app, arguments, catch_exceptions=False)
