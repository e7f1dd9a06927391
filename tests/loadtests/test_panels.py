from loadtests.panels import panels, short_names
from loadtests.record import Sample

ENGINE = '{engine="0"}'


def names(*samples: Sample) -> list[list[str]]:
    return [[line.name for line in lines] for lines in panels(samples)[0]]


def test_series_on_one_subject_share_a_panel() -> None:
    metrics = ("waiting_requests", "slots", "resident_adapters", "in_flight_requests", "cache_usage", "requests_total")
    sample = Sample(1.0, {f"gateway:gateway_{metric}{ENGINE}": 1.0 for metric in metrics})
    assert names(sample) == [
        ["in flight requests", "waiting requests"],
        ["resident adapters", "slots"],
        ["cache usage"],
        ["requests total"],
    ]


def test_a_pages_own_name_says_nothing_of_its_subject() -> None:
    assert names(Sample(1.0, {"adapters:up": 1.0, "adapters:slots": 2.0})) == [["slots"], ["up"]]


def test_a_line_holds_the_instants_at_which_its_series_was_scraped() -> None:
    samples = [Sample(1.0, {"x:a": 1.0}), Sample(2.0, {"x:b": 5.0}), Sample(3.0, {"x:a": 2.0})]
    lines = {line.name: line.points for panel in panels(samples)[0] for line in panel}
    assert lines == {"a": [(1.0, 1.0), (3.0, 2.0)], "b": [(2.0, 5.0)]}


def test_of_very_many_series_those_that_rose_highest_are_drawn_and_the_rest_counted() -> None:
    sample = Sample(1.0, {f'engine:waiting_requests{{engine="{i:02}"}}': float(i) for i in range(20)})
    (lines,), left_out = panels([sample])
    assert [line.points[0][1] for line in lines] == [float(i) for i in range(12, 20)]
    assert left_out == 12


def test_labels_are_told_where_they_differ() -> None:
    assert short_names(['p:x_slots{engine="0"}', 'p:x_slots{engine="1"}']) == {
        'p:x_slots{engine="0"}': 'x slots engine="0"',
        'p:x_slots{engine="1"}': 'x slots engine="1"',
    }
    assert short_names(["p:gateway_engine_slots", "p:gateway_engine_slots_free"]) == {
        "p:gateway_engine_slots": "slots",
        "p:gateway_engine_slots_free": "slots free",
    }
    assert short_names([]) == {}


def test_of_several_pages_each_is_named_and_its_own_common_words_are_left_out() -> None:
    running, waiting = "engine:vllm:num_requests_running", "engine:vllm:num_requests_waiting"
    assert short_names([running, waiting, "gateway:gateway_slots"]) == {
        running: "engine running",
        waiting: "engine waiting",
        "gateway:gateway_slots": "gateway gateway slots",
    }


def test_entries_of_a_label_that_are_counted_belong_to_that_labels_subject() -> None:
    sample = Sample(1.0, {"engine:vllm:lora_requests_info.running_lora_adapters": 2.0, "engine:vllm:slots": 4.0})
    assert names(sample) == [["running lora adapters", "vllm slots"]]
