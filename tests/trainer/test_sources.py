"""The files inside packages become chat rows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.sources import ENTITY_KINDS, convert, entities_as_json
from trainer.errors import FetchError

TAB = b"Category\tText\nd\tstring\nclass\t\nearn\tone two three four\nacq\t  \n\nship\tfive six\n"


def test_a_tab_file_gives_label_and_shortened_text() -> None:
    rows = convert("labelled-tab", TAB, {"system": "s", "max_words": 3})
    assert [(row[1]["content"], row[2]["content"]) for row in rows] == [("one two three", "earn"), ("five six", "ship")]


def test_entities_keep_their_order_and_lose_their_repeats() -> None:
    ideal = "[Acme, Inc - ORGANIZATION, Ann Lee - PERSON, Acme, Inc - ORGANIZATION, Rome - LOCATION]"
    assert json.loads(entities_as_json(ideal)) == {
        "person": ["Ann Lee"],
        "organization": ["Acme, Inc"],
        "location": ["Rome"],
    }


def test_no_entities_are_three_empty_lists() -> None:
    assert json.loads(entities_as_json("No entities found")) == {kind: [] for kind in ENTITY_KINDS}


@given(st.text())
def test_any_ideal_gives_the_same_three_keys(ideal: str) -> None:
    assert list(json.loads(entities_as_json(ideal))) == list(ENTITY_KINDS)


def sample(text: str, ideal: str) -> str:
    return json.dumps(
        {"input": [{"role": "system", "content": "x"}, {"role": "user", "content": text}], "ideal": ideal}
    )


def test_rows_without_entities_are_kept_to_their_share() -> None:
    lines = [sample(f"Bank {n}", "[Bank - ORGANIZATION]") for n in range(6)]
    lines += [sample(f"nothing {n}", "No entities found") for n in range(20)]
    rows = convert("named-entities", "\n".join(lines).encode(), {"system": "s", "max_words": 9, "keep_empty": 0.25})
    empty = [row for row in rows if row[2]["content"] == entities_as_json("No entities found")]
    assert len(rows) - len(empty) == 6
    assert len(empty) == 2


def test_a_file_of_another_shape_is_a_fetch_error() -> None:
    with pytest.raises(FetchError, match="named-entities"):
        convert("named-entities", b"{}\n", {"system": "s", "max_words": 9, "keep_empty": 0.25})
    with pytest.raises(FetchError, match="no rows"):
        convert("labelled-tab", b"", {"system": "s", "max_words": 9})
