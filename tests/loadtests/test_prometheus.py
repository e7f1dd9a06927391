import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loadtests.prometheus import parse_series, read_series

PAGE = """# HELP queue_depth Requests that wait, by queue_depth{engine="0"} and such.
# TYPE queue_depth gauge
queue_depth{engine="0",adapter="a"} 3.0
queue_depth{engine="0",adapter="b"} 4
queue_depth{engine="1",adapter="a"} 5.0 1700000000000
queue_depth_max 99.0
slots 1e3
slots2 5
holds{running="",waiting="a"} 1.7638e+09
holds{running="a,b/c@1",waiting=""} 1.7639e+09
holds{running="a",waiting=""} 1.7637e+09
broken NaN
huge +Inf"""


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ("queue_depth", 12.0),
        ('queue_depth{engine="0"}', 7.0),
        ('queue_depth{adapter="a", engine="1"}', 5.0),
        ('queue_depth{engine="2"}', None),
        ("queue_depth_max", 99.0),
        ("queue", None),
        ("slots", 1000.0),
        ("holds.running", 2.0),
        ("holds.waiting", 0.0),
        ("holds.other", None),
        ("slots.running", None),
        ("broken", None),
        ("huge", None),
    ],
)
def test_a_series_is_the_sum_over_the_labels_it_does_not_name_or_what_the_newest_lists(
    series: str, value: float | None
) -> None:
    assert read_series(PAGE, parse_series(series)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1name",
        "name{",
        "name{a=b}",
        "name.",
        "name.a.b",
        'name{a="b"}.c',
        'name{a="b"',
        'name{a="b" c="d"}',
        "a name",
    ],
)
def test_what_names_no_series_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_series(text)


@given(values=st.dictionaries(st.tuples(st.text(max_size=5), st.sampled_from("xy")), st.integers(1, 9), max_size=6))
def test_pages_of_the_official_client_are_read_whatever_their_labels_hold(values: dict[tuple[str, str], int]) -> None:
    registry = CollectorRegistry()
    counter = Counter("asked", "Requests.", ["adapter", "kind"], registry=registry)
    Histogram("asked_seconds", "Time.", registry=registry).observe(2)
    for (adapter, kind), value in values.items():
        counter.labels(adapter, kind).inc(value)
    page = generate_latest(registry).decode()
    assert read_series(page, parse_series("asked_total")) == (sum(values.values()) or None)
    for adapter, kind in values:
        escaped = adapter.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        mine = sum(value for (name, _), value in values.items() if name == adapter)
        assert read_series(page, parse_series(f'asked_total{{adapter="{escaped}"}}')) == mine
        one = parse_series(f'asked_total{{kind="{kind}",adapter="{escaped}"}}')
        assert read_series(page, one) == values[adapter, kind]
    assert read_series(page, parse_series('asked_seconds_bucket{le="+Inf"}')) == 1
