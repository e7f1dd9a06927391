"""Several engines' Prometheus pages as one."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.expositions import merged

LABELS = st.lists(
    st.sampled_from(['"', ",", "{", "}", "=", " ", "\\", "\n", "\u2028", "engine=", 'engine="0"']), max_size=6
)


def exposed(*, running: float = 0.0, model: str = "base") -> str:
    registry = CollectorRegistry()
    labels = ["engine", "model_name"]
    Gauge("vllm:num_requests_running", "Running.", labels, registry=registry).labels("0", model).set(running)
    Counter("vllm:request_success", "Done.", labels, registry=registry).labels("0", model).inc(3)
    Histogram("vllm:time_to_first_token_seconds", "First.", labels, registry=registry).labels("0", model).observe(0.3)
    Gauge("vllm:lora_requests_info", "Names.", ["running_lora_adapters"], registry=registry).labels("a,b").set(1)
    Gauge("process_open_fds", "Files.", registry=registry).set(7)
    return generate_latest(registry).decode()


def samples(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_every_series_says_which_engine_it_is_from() -> None:
    page = samples(merged({"engine-0": exposed(running=2.0), "engine-1": exposed(running=5.0)}))
    assert page["vllm:num_requests_running"] == [
        ({"engine": "engine-0", "exported_engine": "0", "model_name": "base"}, 2.0),
        ({"engine": "engine-1", "exported_engine": "0", "model_name": "base"}, 5.0),
    ]
    assert page["process_open_fds"] == [({"engine": "engine-0"}, 7.0), ({"engine": "engine-1"}, 7.0)]


def test_an_engine_that_is_away_is_said_to_be_and_takes_nothing_from_the_others() -> None:
    page = samples(merged({"engine-0": None, "engine-1": exposed()}))
    assert page["gateway_engine_page"] == [({"engine": "engine-0"}, 0.0), ({"engine": "engine-1"}, 1.0)]
    assert [labels["engine"] for labels, _ in page["vllm:request_success_total"]] == ["engine-1"]


def test_each_metric_is_described_once_and_its_series_stay_together() -> None:
    lines = merged({"engine-0": exposed(), "engine-1": exposed()}).splitlines()
    described = [line for line in lines if line.startswith("# TYPE")]
    assert len(described) == len(set(described))
    own = tuple(f"vllm:time_to_first_token_seconds_{part}" for part in ("bucket", "sum", "count"))
    where = [number for number, line in enumerate(lines) if line.startswith(own)]
    assert where == list(range(where[0], where[0] + len(where)))


def test_a_series_that_names_every_combination_of_adapters_is_left_out() -> None:
    assert "lora_requests_info" not in merged({"engine-0": exposed()})


@given(parts=LABELS)
def test_nothing_but_the_engine_changes_whatever_stands_in_a_label(parts: list[str]) -> None:
    page = exposed(model="".join(parts))
    before, after = samples(page), samples(merged({"engine-0": page}))
    before.pop("vllm:lora_requests_info")
    after.pop("gateway_engine_page")
    renamed = {
        name: [({**labels, "engine": "engine-0"}, value) for labels, value in series] for name, series in before.items()
    }
    for series in after.values():
        for labels, _ in series:
            labels.pop("exported_engine", None)
    assert after == renamed
