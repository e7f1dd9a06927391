"""Personal data: every kind is found and replaced, nothing is asked of the network, and the quick look misses nothing."""

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.privacy import PersonalData, may_hold
from trainer.data.recipe import KINDS, PrivacyConfig

EXAMPLES = {
    "EMAIL_ADDRESS": "ann.lee@example.com",
    "PHONE_NUMBER": "+44 20 7946 0958",
    "CREDIT_CARD": "4111 1111 1111 1111",
    "IBAN_CODE": "DE89 3704 0044 0532 0130 00",
    "US_SSN": "536-90-4399",
    "IP_ADDRESS": "2001:db8::1",
}
PARTS = st.sampled_from(
    [
        *EXAMPLES.values(),
        *"0123456789",
        " ",
        "-",
        "(",
        ")",
        ".",
        "+",
        ":",
        "::",
        "@",
        "a",
        "DE",
        "x",
        ".com",
        "192.168.",
        "555",
    ]
)


@pytest.mark.parametrize(
    "text", ["It costs 12.50, or 1,200 for all 3.", "At 10:30 on Monday", "", "version 3.11", "a@ b"]
)
def test_plain_texts_are_not_looked_at_twice(text: str) -> None:
    assert not may_hold(text)


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES)
def test_each_kind_is_looked_at(text: str) -> None:
    assert may_hold(text)


def test_off_leaves_texts_alone() -> None:
    cleaned = PersonalData(PrivacyConfig(action="off")).clean(list(EXAMPLES.values()))
    assert cleaned.texts == list(EXAMPLES.values())
    assert not cleaned.found


@pytest.fixture(scope="module")
def personal() -> PersonalData:
    return PersonalData(PrivacyConfig())


@pytest.mark.slow
def test_every_kind_is_found_and_replaced_without_the_network(
    personal: PersonalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    cleaned = personal.clean([f"Mine is {example}, thank you." for example in EXAMPLES.values()])
    assert cleaned.texts == [f"Mine is <{kind}>, thank you." for kind in EXAMPLES]
    assert set(cleaned.found) == set(EXAMPLES) == set(KINDS)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=14).map("".join))
def test_the_quick_look_misses_nothing_that_would_be_found(personal: PersonalData, text: str) -> None:
    if not may_hold(text):
        found = personal._analyzer.analyze(text, language="en", entities=list(KINDS), score_threshold=0.4)
        assert not found, text


@pytest.mark.slow
def test_only_the_kinds_that_are_wanted_are_replaced() -> None:
    some = PersonalData(PrivacyConfig(kinds=("EMAIL_ADDRESS",)))
    assert some.clean(["joe@example.com, 192.168.1.20"]).texts == ["<EMAIL_ADDRESS>, 192.168.1.20"]
