from hypothesis import given
from hypothesis import strategies as st

from loadtests.sse import EventParser

STREAM = b'data: {"a": 1}\n\n: comment\n\nevent: error\r\ndata: {"b": 2}\r\n\r\ndata: one\ndata:two\n\ndata: [DONE]\n\n'
EVENTS = [(b"", b'{"a": 1}'), (b"error", b'{"b": 2}'), (b"", b"one\ntwo"), (b"", b"[DONE]")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(STREAM)]
    parser = EventParser()
    pieces = [STREAM[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_an_event_without_its_blank_line_is_not_complete() -> None:
    assert EventParser().feed(b"data: 1\n") == []
