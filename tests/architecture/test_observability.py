"""Dashboard and alerts ask for what gateway and engine really tell."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.errors import ERROR_OBJECTS, UNKNOWN
from gateway.metrics import Metrics
from tests.architecture.observability import (
    ENGINE_SERIES,
    FOLDER,
    OF_PROMETHEUS,
    Use,
    expressions,
    load_dashboard,
    load_rules,
    load_scrapes,
    uses,
)
from tests.factories import make_base
from tests.gateway.conftest import running_gateway
from tests.gateway.test_generation import chat, publisher

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"
OUTCOMES = {found.code for found in ERROR_OBJECTS.values()} | {UNKNOWN.code, "ok", "cancelled"}
VALUES = {"outcome": OUTCOMES, "reason": OUTCOMES | {"deadline", "room", "unused"}}
JOBS = {scrape["job_name"]: scrape["metrics_path"] for scrape in load_scrapes(FOLDER / "prometheus.yml")}


def test_every_expression_parses() -> None:
    assert len(list(expressions())) > 60
    assert len(uses()) > 60


@pytest.fixture
async def told(tmp_path: Path) -> dict[str, set[str] | None]:
    """Series of a gateway that has worked, and their labels; None where there is no sample yet."""
    async with running_gateway(tmp_path / "home", make_base(tmp_path / "base")) as gateway:
        await publisher(gateway, tmp_path)("support", text="one two three")
        async with await gateway.client() as client:
            await client.post("/v1/chat/completions", json=chat("support", stream=True))
            await client.post("/v1/chat/completions", json=chat("nobody"))
        async with gateway.anonymous() as client:
            pages = [(await client.get(path)).text for path in JOBS.values()]
    found: dict[str, set[str] | None] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            names = [family.name, *(f"{family.name}_{part}" for part in ("total", "bucket", "sum", "count"))]
            found |= {name: None for name in names if name not in found}
            found |= {sample.name: set(sample.labels) for sample in family.samples}
    return found


def declared() -> dict[str, set[str]]:
    """Labels of every series that has not been told of yet."""
    collectors = [one for one in vars(Metrics.create()).values() if hasattr(one, "_labelnames")]
    return {one._name: set(one._labelnames) for one in collectors}


def labels_of(series: str, told: dict[str, set[str] | None]) -> set[str]:
    labels = told[series]
    return declared()[re.sub("_(total|bucket|sum|count)$", "", series)] if labels is None else labels


async def test_every_series_of_the_gateway_exists_with_the_labels_asked_of_it(
    told: dict[str, set[str] | None],
) -> None:
    asked = [use for use in uses() if use.series.startswith("gateway_")]
    assert len(asked) > 40
    for use in asked:
        assert use.series in told, use
        assert use.labels <= labels_of(use.series, told) | OF_PROMETHEUS, use


def test_every_series_of_the_engine_is_one_that_vllm_has() -> None:
    """The list is what the engine's own contract test compares with the real engine."""
    known = json.loads(ENGINE_SERIES.read_text(encoding="utf-8"))
    for use in uses():
        if use.series.startswith("vllm:"):
            assert use.series in known, use
            assert use.labels <= {*known[use.series], "engine"} | OF_PROMETHEUS, use


def test_nothing_is_asked_of_anybody_else() -> None:
    assert {use.series for use in uses() if not use.series.startswith(("gateway_", "vllm:"))} == {"up"}


@pytest.mark.parametrize("label", VALUES)
def test_outcomes_and_reasons_are_ones_that_occur(label: str) -> None:
    asked = {value for use in uses() for name, value in use.values if name == label}
    assert asked <= VALUES[label]
    assert asked or label == "reason"


def test_jobs_are_those_of_the_scrape_example() -> None:
    assert JOBS == {"lorikeet": "/metrics", "lorikeet-engines": "/metrics/engines"}
    assert {value for use in uses() for name, value in use.values if name == "job"} <= set(JOBS)


def test_an_operator_finds_each_alert_explained() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    for rule in load_rules(FOLDER / "alerts.yaml"):
        assert f"`{rule['alert']}`" in text, f"docs/operations.md does not say what {rule['alert']} means"
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_panels_have_names_of_their_own_and_do_not_overlap() -> None:
    panels = load_dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_a_series_that_does_not_exist_would_be_noticed() -> None:
    """The checks above compare; this one shows that what they compare is taken out of the expressions whole."""
    by_where = {use.where: use for use in uses()}
    assert by_where["LorikeetFirstTokenSlow"] == Use(
        "LorikeetFirstTokenSlow",
        "gateway_time_to_first_token_seconds_bucket",
        frozenset({"le", "adapter_state"}),
        (("adapter_state", "warm"),),
    )
    assert {use.series for use in uses() if use.where == "LorikeetSlotsSaturated"} == {
        "gateway_engine_leased_adapters",
        "gateway_engine_slots",
        "gateway_engine_waiting_requests",
    }
