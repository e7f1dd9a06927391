"""What a training tells its worker, through kills of either."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.journal import JOURNAL_FILE, Entry, Journal, JournalReader


def test_only_whole_lines_are_read_and_a_torn_one_goes(tmp_path: Path) -> None:
    Journal(tmp_path).write(Entry("a", "note", 1.0, {}))
    reader = JournalReader(tmp_path)
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(b'{"key": "b"')
    assert [entry.key for entry in reader.news()] == ["a"]
    Journal(tmp_path).write(Entry("c", "note", 2.0, {}))
    assert [entry.key for entry in reader.news()] == ["c"]
    assert [entry.key for entry in JournalReader(tmp_path).news()] == ["a", "c"]


@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_wherever_writers_are_killed_what_was_whole_stays_in_order(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    whole = []
    for number, cut in enumerate(cuts):
        Journal(folder).write(Entry(f"n{number}", "note", 0.0, {"text": "x" * 20}))
        path = folder / JOURNAL_FILE
        lines = path.read_bytes().splitlines(keepends=True)
        torn = lines[-1][: len(lines[-1]) - cut] if cut < len(lines[-1]) else b""
        path.write_bytes(b"".join(lines[:-1]) + torn)
        if cut == 0:
            whole.append(f"n{number}")
    Journal(folder).write(Entry("end", "note", 0.0, {}))
    assert [entry.key for entry in JournalReader(folder).news()] == [*whole, "end"]
