"""Rows of every usual format become the one that is written."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.chat import row_fault
from trainer.data.formats import recognise, texts_of, to_value, with_system, with_texts

ASKED = {"role": "user", "content": "Hi?"}
SAID = {"role": "assistant", "content": "Hello."}
CHAT = {"messages": [ASKED, SAID]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "messages conversations from value role content prompt chosen rejected text instruction output".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (CHAT, "chat"),
        ({"conversations": [ASKED, SAID]}, "chat"),
        ({"messages": json.dumps([ASKED, SAID])}, "chat"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, SAID]}, "chat"),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}, "sharegpt"),
        ({"instruction": "Hi?", "input": "", "output": "Hello."}, "alpaca"),
        ({"prompt": "Hi?", "completion": "Hello."}, "prompt-completion"),
        ({"prompt": [ASKED], "completion": [SAID]}, "prompt-completion"),
        ({"question": "Hi?", "answer": "Hello."}, "prompt-completion"),
    ],
)
def test_conversations_of_every_format_become_the_same_row(raw: Any, kind: str) -> None:
    assert recognise(raw) == kind
    assert to_value(raw, "chat") == CHAT


def test_the_input_of_an_alpaca_row_follows_its_instruction() -> None:
    row = to_value({"instruction": "Translate.", "input": "Hund", "output": "dog"}, "chat")
    assert isinstance(row, dict)
    assert row["messages"][0]["content"] == "Translate.\n\nHund"


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [{"role": "assistant", "content": "Go away."}]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, {"role": "assistant", "content": "Go away."}]},
        {"prompt": "Hi?", "chosen": [ASKED, SAID], "rejected": [ASKED, {"role": "assistant", "content": "Go away."}]},
    ],
)
def test_preference_pairs_become_prompt_and_two_answers(raw: Any) -> None:
    value = to_value(raw, "preference")
    assert value == {"prompt": [ASKED], "chosen": [SAID], "rejected": [{"role": "assistant", "content": "Go away."}]}


@pytest.mark.parametrize(
    ("raw", "wanted", "said"),
    [
        ({"messages": [ASKED]}, "chat", "last message"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "chat", "role 'tool'"),
        ({"prompt": "Hi?", "completion": ""}, "chat", "no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]}, "chat", "no text"),
        ({"text": "  "}, "text", "empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a "}, "preference", "same"),
        ({"chosen": "a", "rejected": "b"}, "preference", 'no "prompt"'),
        ({"prompt": "p", "chosen": "a", "rejected": []}, "preference", "rejected"),
        ({"chosen": [ASKED, SAID], "rejected": [SAID, SAID]}, "preference", "different conversations"),
        (CHAT, "text", "a chat row"),
        ({"a": 1}, "chat", "no format"),
        (3, "chat", "no format"),
    ],
)
def test_what_keeps_a_row_from_being_one_is_named(raw: Any, wanted: Any, said: str) -> None:
    assert said in str(to_value(raw, wanted))


@given(JSON)
def test_whatever_is_given_is_a_valid_row_or_a_reason(raw: Any) -> None:
    value = to_value(raw, "chat")
    assert isinstance(value, str) or row_fault(value) is None
    for wanted in ("preference", "text"):
        assert isinstance(to_value(raw, wanted), (str, dict))


@given(st.sampled_from([CHAT, {"text": "t"}, {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}]))
def test_texts_can_be_taken_out_and_put_back(value: dict[str, Any]) -> None:
    assert with_texts(value, texts_of(value)) == value


def test_a_system_message_is_added_where_there_is_none() -> None:
    once = with_system(CHAT, "Be brief.")
    assert once["messages"][0] == {"role": "system", "content": "Be brief."}
    assert with_system(once, "Other.") == once
    assert with_system({"text": "t"}, "Be brief.") == {"text": "t"}
