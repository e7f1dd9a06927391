import math

import pytest

from gateway.deadline import patience_of
from gateway.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("headers", "patience_s"),
    [
        ({}, math.inf),
        ({"x-stainless-read-timeout": "600"}, 600.0),
        ({"x-stainless-read-timeout": "2.5"}, 2.5),
        ({"x-stainless-read-timeout": "NOT_GIVEN"}, math.inf),
        ({"x-stainless-read-timeout": "nan"}, math.inf),
        ({"x-lorikeet-deadline-ms": "1500"}, 1.5),
        ({"x-lorikeet-deadline-ms": "1500", "x-stainless-read-timeout": "1"}, 1.0),
        ({"x-lorikeet-deadline-ms": "1500", "x-stainless-read-timeout": "600"}, 1.5),
    ],
)
def test_the_shorter_of_both_headers_counts(headers: dict[str, str], patience_s: float) -> None:
    assert patience_of(headers) == patience_s


@pytest.mark.parametrize("value", ["", "soon", "0", "-3", "nan"])
def test_an_own_header_that_is_no_time_is_named(value: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        patience_of({"x-lorikeet-deadline-ms": value})
    assert refusal.value.param == "x-lorikeet-deadline-ms"
