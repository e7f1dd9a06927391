"""What the figures of both forms advise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway.choice import FormFigures, Memory, advise, figures_of, scenario
from gateway.client import CommandError
from loadtests.scenario import load_scenario

SLOW = FormFigures(
    p50_s={"ttft": 0.1, "tpot": 0.02, "e2e": 0.8},
    p95_s={"ttft": 0.2, "tpot": 0.04, "e2e": 1.0},
    tokens_per_s=100.0,
    answers_per_s=3.0,
    requests=120,
    success_rate=1.0,
)
FAST = replace(SLOW, p95_s={name: value / 2 for name, value in SLOW.p95_s.items()}, tokens_per_s=150.0)
HALF = Memory(shared=2000, dedicated=1000, adapter=10)


def test_an_engine_of_its_own_pays_from_its_share_of_a_shared_engines_cost() -> None:
    advice = advise(SLOW, FAST, HALF)
    assert (advice.form, advice.pays_from, advice.pays_from_tokens_per_s) == ("merged", 0.5, 50.0)
    assert (advice.faster, advice.cost_ratio) == (1.5, 0.5)
    assert "50% shorter" in advice.reasons[0]


def test_a_gain_within_the_noise_buys_nothing() -> None:
    advice = advise(SLOW, replace(SLOW, tokens_per_s=104.0), HALF)
    assert (advice.form, advice.pays_from) == ("adapter", None)
    assert "buys nothing" in advice.reasons[-1]


def test_an_engine_that_costs_more_than_it_gives_is_for_latency_alone() -> None:
    advice = advise(SLOW, FAST, Memory(shared=1000, dedicated=2000, adapter=10))
    assert (advice.form, advice.pays_from) == ("adapter", None)
    assert "only its latency" in advice.reasons[-1]


def test_few_requests_are_told_of() -> None:
    assert "measure longer" in " ".join(advise(replace(SLOW, requests=20), FAST, HALF).reasons)
    assert "measure longer" not in " ".join(advise(SLOW, FAST, HALF).reasons)


def test_without_figures_of_memory_it_costs_as_much_as_a_shared_one() -> None:
    assert advise(SLOW, FAST, None).pays_from == 1.0


def test_a_price_gives_the_cost_of_a_million_tokens_at_full_use() -> None:
    costs = advise(SLOW, FAST, HALF, price_per_hour=0.36).cost_per_million_tokens
    assert costs == pytest.approx({"adapter": 1.0, "merged": 0.5 / 1.5})


@given(faster=st.floats(0.1, 10), ratio=st.floats(0.01, 10))
def test_it_never_pays_at_a_traffic_it_could_not_carry(faster: float, ratio: float) -> None:
    merged = replace(FAST, tokens_per_s=SLOW.tokens_per_s * faster)
    advice = advise(SLOW, merged, Memory(shared=100_000, dedicated=round(100_000 * ratio), adapter=1))
    if advice.pays_from_tokens_per_s is not None:
        assert advice.pays_from_tokens_per_s <= merged.tokens_per_s * (1 + 1e-9)


def test_the_load_is_a_scenario_in_which_the_forms_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "choose.yaml"
    path.write_text(yaml.safe_dump(scenario("support@3", concurrency=4, round_s=5, rounds=2, max_tokens=16)))
    loaded = load_scenario(path)
    measured = [phase for phase in loaded.phases if phase.measured]
    assert [phase.name for phase in measured] == ["adapter-0", "merged-0", "merged-1", "adapter-1"]
    assert measured[1].adapters == ["support@3#merged"]


def test_figures_come_from_the_summary_and_their_absence_is_told() -> None:
    metrics = {name: {"p50": {"value": 1.0}, "p95": {"value": 2.0}} for name in ("ttft", "tpot", "e2e", "lag")}
    rates = {"output_tokens_per_s": 10.0, "answers_per_s": 1.0}
    own = {"kind": "adapter", "name": "s@1#merged", "metrics_s": metrics, "requests": 5, "success_rate": 1.0}
    phases = [{"kind": "phase", "name": f"merged-{n}", **rates, "output_tokens_per_s": 10.0 * n} for n in (1, 3)]
    summary: dict[str, Any] = {"groups": [own, *phases], "errors": [{"error": "no_replica", "count": 4}]}
    found = figures_of(summary, "s@1", "merged")
    assert (found.tokens_per_s, found.p95_s["ttft"], found.requests) == (20.0, 2.0, 5)
    with pytest.raises(CommandError, match=r"no_replica \(4\)"):
        figures_of(summary, "s@1", "adapter")
