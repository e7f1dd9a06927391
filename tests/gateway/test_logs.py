"""One JSON object a line."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from gateway import logs


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_line_holds_the_event_and_its_facts_as_fields() -> None:
    stream = io.StringIO()
    logs.configure("INFO", stream)
    logging.getLogger("gateway.x").info("adapter loaded", extra={"adapter": "acme/support@3", "load_s": 0.03})
    line = json.loads(stream.getvalue())
    assert line["event"] == "adapter loaded"
    assert (line["level"], line["adapter"], line["load_s"]) == ("info", "acme/support@3", 0.03)
    assert line["at"].endswith("Z")


def test_an_exception_stays_within_its_line() -> None:
    stream = io.StringIO()
    logs.configure("INFO", stream)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("gateway.x").exception("request failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: no" in json.loads(stream.getvalue())["trace"]


def test_lines_below_the_level_are_left_out() -> None:
    stream = io.StringIO()
    logs.configure("warning", stream)
    logging.getLogger("gateway.x").info("quiet")
    assert stream.getvalue() == ""
